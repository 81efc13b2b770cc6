//! The binary `kornak`: it runs the agent and the proxy, and it is the operator's tool, with patronictl's
//! verbs, options, questions and tables.
//!
//! A verb finds the cluster ([`target`]), reads it into one form wherever it came from ([`view`]),
//! shows it ([`render`]) and asks a node by REST to do something ([`cmd`]). Nothing here decides
//! anything about a cluster.

pub mod cmd;
pub mod demo_note;
pub mod diff;
pub mod logging;
pub mod output;
pub mod render;
pub mod signals;
pub mod store;
pub mod target;
pub mod view;
pub mod when;
