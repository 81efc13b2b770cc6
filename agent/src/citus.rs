//! Citus: a cluster of groups, each a small cluster of its own; group 0 is the coordinator.
//!
//! Agents of all groups follow the whole cluster in the store. The leader of the coordinator's group
//! keeps `pg_dist_node` what the store says ([`plan`], ordered by [`flight`], carried out by `citus_tasks`,
//! one task for each database). The leaders of the other groups tell it when they are about to stop and
//! when they are there (`citus_tasks::notify`), in Patroni's words, so that either may be Patroni's; what they do
//! not say, or what gets lost, the store says a moment later. Every leader keeps the tables that are its
//! own and ends what failovers have left prepared (`citus_tasks`, for how long: [`settling`]), and the
//! coordinator's publishes whether rows and store agree ([`Desk`]).
//!
//! This module holds the pure decisions, and the desk where requests and answers meet.
//!
//! Not here: the tasks that carry decisions out (`crate::citus_tasks`), how proxies hold the whole cluster's sessions while one group switches
//! (`kornak_cluster::handover`), and the parameters that the extension needs (`postgres::citus`).

pub mod desk;
pub mod flight;
pub mod plan;
pub mod seen;
pub mod settling;

pub use desk::Desk;
