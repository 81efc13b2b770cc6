//! The cost of a proxy: pgbench against one PostgreSQL, directly and through what a user might put in
//! front of it, all started in the same run on the same machine.
//!
//! The bench of the cores is in `benches/`; how to read both is in README.md.

pub mod idle;
pub mod rows;
pub mod table;
pub mod ways;
