//! Text to settings that cannot be wrong.
//!
//! An agent's file is Patroni's YAML; a proxy's file has the same head and a `proxy:` section. What
//! comes out is checked and complete, so no later code asks whether a value makes sense. An error
//! names file, line, key and what was expected.
//!
//! Nothing here opens a socket, reads a clock or the environment: the environment is an argument.
//! Not here: the dynamic configuration in the store ([`kornak_cluster::ClusterConfig`]).

pub mod address;
pub mod agent;
pub mod log;
pub mod proxy;
pub mod store;

pub use address::{HostPort, Listen};
pub use agent::AgentSettings;
pub use log::{LogFormat, LogLevel, LogSettings};
pub use proxy::ProxySettings;
pub use store::{Etcd3Settings, Scheme, StoreSettings};
