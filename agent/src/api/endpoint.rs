//! The endpoints of the REST API: from method and path to one closed list.
//!
//! Not here: what an endpoint does ([`super::Api`]).

use axum::http::Method;

/// The endpoint that a request names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// `GET /patroni`: the node's status after a look at its server.
    Patroni,
    /// Any other GET request.
    Page(Page),
    /// HEAD and OPTIONS: the status code of a health check alone.
    Check,
    /// A request that changes something and needs permission.
    Change(Change),
    /// A method and path that the API does not have.
    Unsupported,
}

/// A page that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Page {
    Cluster,
    History,
    Config,
    Failsafe,
    Metrics,
    Liveness,
    Readiness,
    /// `GET /kornak/node`: the node's status for operators, in Kornak's own format.
    Operator,
    /// Every other path: a health check that is recognised by a part of the path, as Patroni does.
    Health,
}

/// A change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    PatchConfig,
    ReplaceConfig,
    Switchover,
    UnscheduleSwitchover,
    Failover,
    Restart,
    UnscheduleRestart,
    Reload,
    Reinitialize,
    /// A leader without the store asks whether it may stay.
    Failsafe,
    /// Patroni stops at this request on Windows, for its tests; everywhere else it only answers.
    Sigterm,
    /// Another Citus group's leader announces a change of its primary.
    Citus,
    /// `POST /kornak/checkpoint`.
    Checkpoint,
}

impl Endpoint {
    /// Reads method and path. The path's first element chooses the endpoint; what follows is ignored, as
    /// by Patroni, except for Kornak's own endpoints.
    pub(super) fn of(method: &Method, path: &str) -> Self {
        let first = path.strip_prefix('/').unwrap_or(path).split('/').next().unwrap_or_default();
        if matches!(*method, Method::HEAD | Method::OPTIONS) {
            return Self::Check;
        }
        match (method.as_str(), first) {
            ("GET", "patroni") => Self::Patroni,
            ("GET", first) => Self::Page(match first {
                "cluster" => Page::Cluster,
                "history" => Page::History,
                "config" => Page::Config,
                "failsafe" => Page::Failsafe,
                "metrics" => Page::Metrics,
                "liveness" => Page::Liveness,
                "readiness" => Page::Readiness,
                "kornak" if path == "/kornak/node" => Page::Operator,
                _ => Page::Health,
            }),
            ("PATCH", "config") => Self::Change(Change::PatchConfig),
            ("PUT", "config") => Self::Change(Change::ReplaceConfig),
            ("DELETE", "switchover") => Self::Change(Change::UnscheduleSwitchover),
            ("DELETE", "restart") => Self::Change(Change::UnscheduleRestart),
            ("POST", "switchover") => Self::Change(Change::Switchover),
            ("POST", "failover") => Self::Change(Change::Failover),
            ("POST", "restart") => Self::Change(Change::Restart),
            ("POST", "reload") => Self::Change(Change::Reload),
            ("POST", "reinitialize") => Self::Change(Change::Reinitialize),
            ("POST", "failsafe") => Self::Change(Change::Failsafe),
            ("POST", "sigterm") => Self::Change(Change::Sigterm),
            ("POST", "citus" | "mpp") => Self::Change(Change::Citus),
            ("POST", "kornak") if path == "/kornak/checkpoint" => Self::Change(Change::Checkpoint),
            _ => Self::Unsupported,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_method_and_path_names_one_endpoint() {
        let rows = [
            ("GET", "/patroni/anything", Endpoint::Patroni),
            ("GET", "/", Endpoint::Page(Page::Health)),
            ("GET", "/kornak", Endpoint::Page(Page::Health)),
            ("GET", "/kornak/node", Endpoint::Page(Page::Operator)),
            ("HEAD", "/config", Endpoint::Check),
            ("OPTIONS", "/primary", Endpoint::Check),
            ("POST", "/mpp", Endpoint::Change(Change::Citus)),
            ("POST", "/restart/now", Endpoint::Change(Change::Restart)),
            ("POST", "/kornak/checkpoint", Endpoint::Change(Change::Checkpoint)),
            ("POST", "/kornak/other", Endpoint::Unsupported),
            ("POST", "/config", Endpoint::Unsupported),
            ("DELETE", "/failover", Endpoint::Unsupported),
            ("TRACE", "/cluster", Endpoint::Unsupported),
        ];
        for (method, path, expected) in rows {
            let method = method.parse().unwrap();
            assert_eq!(Endpoint::of(&method, path), expected, "{method} {path}");
        }
    }
}
