//! The demo's ports: the well-known ones unless a first port is given, all checked before anything
//! is started.

use std::net::TcpListener;

use anyhow::bail;

/// Which port is whose.
#[derive(Debug, Clone)]
pub(super) struct Ports {
    named: Vec<(String, u16)>,
    from: Option<u16>,
    nodes: u16,
}

impl Ports {
    /// With `from`: listeners at `from`.. , servers at `from` + 10.., REST at `from` + 20.., etcd at
    /// `from` + 30..; otherwise the documented defaults.
    pub(super) fn choose(from: Option<u16>, nodes: u16, etcd: bool) -> Self {
        let mut ports = Self { named: Vec::new(), from, nodes };
        let mut named = vec![
            ("the primary listener".to_owned(), ports.primary()),
            ("the workers listener".to_owned(), ports.workers()),
            ("the standbys listener".to_owned(), ports.standbys()),
            ("the status page".to_owned(), ports.status()),
        ];
        for index in 1..=nodes {
            named.push((format!("the server of node{index}"), ports.server(index)));
            named.push((format!("the REST API of node{index}"), ports.rest(index)));
        }
        if etcd {
            named.push(("etcd's clients".to_owned(), ports.etcd_client()));
            named.push(("etcd's peers".to_owned(), ports.etcd_peer()));
        }
        ports.named = named;
        ports
    }

    fn at(&self, default: u16, offset: u16) -> u16 {
        self.from.map_or(default, |from| from + offset)
    }

    pub(super) fn primary(&self) -> u16 {
        self.at(5000, 0)
    }

    pub(super) fn workers(&self) -> u16 {
        self.at(5001, 1)
    }

    pub(super) fn standbys(&self) -> u16 {
        self.at(5002, 2)
    }

    pub(super) fn status(&self) -> u16 {
        self.at(7000, 3)
    }

    pub(super) fn server(&self, index: u16) -> u16 {
        self.at(5440, 10) + index
    }

    pub(super) fn rest(&self, index: u16) -> u16 {
        self.at(8007, 20) + index
    }

    pub(super) fn etcd_client(&self) -> u16 {
        self.at(2379, 31)
    }

    pub(super) fn etcd_peer(&self) -> u16 {
        self.at(2380, 32)
    }

    /// REST addresses of all nodes.
    pub(super) fn rest_urls(&self) -> Vec<String> {
        (1..=self.nodes).map(|index| self.rest_url(index)).collect()
    }

    /// REST address of one node.
    pub(super) fn rest_url(&self, index: u16) -> String {
        format!("http://127.0.0.1:{}", self.rest(index))
    }

    /// # Errors
    /// Names the first port that is taken, and the way out.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let other = if self.from == Some(15000) { 16000 } else { 15000 };
        for (whose, port) in &self.named {
            if let Err(error) = TcpListener::bind(("127.0.0.1", *port)) {
                bail!(
                    "port {port}, for {whose}, cannot be used ({error}); is another demo \
                     running? choose other ports with --ports-from, for example --ports-from {other}"
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_parts_share_a_port() {
        for from in [None, Some(15000)] {
            let ports = Ports::choose(from, 9, true);
            let mut numbers: Vec<u16> = ports.named.iter().map(|(_, port)| *port).collect();
            let all = numbers.len();
            numbers.sort_unstable();
            numbers.dedup();
            assert_eq!(numbers.len(), all, "{ports:?}");
        }
    }

    #[test]
    fn a_taken_port_is_named_with_the_way_out() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let ports = Ports::choose(Some(port), 1, false);
        let error = ports.check().unwrap_err().to_string();
        assert!(error.contains(&port.to_string()) && error.contains("--ports-from"), "{error}");
    }
}
