//! Real processes, owned and reaped: whatever a test starts is gone when the test ends, even if
//! the test is killed ([`scratch`]).
//!
//! Servers listen on ports that nobody else uses ([`port`]), on 127.0.0.1 or on hosts of their own ([`lan`]). PostgreSQL refuses to
//! run as root: then the servers run as the OS user `postgres`, as Kornak's own do.

pub mod agent;
pub mod certificates;
pub mod citus;
pub mod cluster;
pub mod etcd;
pub mod haproxy;
pub mod kornak;
pub mod lan;
pub mod patroni;
pub mod port;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod psql;
pub mod rest;
pub mod scratch;
pub mod wait;
pub mod watch;
