//! HAProxy in front of a cluster, configured as Patroni's documentation says (*HAProxy* in its
//! repository's `haproxy.cfg` and on its page *Introduction*).

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};

use super::cluster::Cluster;
use super::port::Port;
use super::process::Process;

/// A running HAProxy with one listener, which leads to the primary.
#[derive(Debug)]
pub struct HaProxy {
    port: Port,
    _process: Process,
}

impl HaProxy {
    /// Starts HAProxy in front of these nodes.
    ///
    /// # Errors
    /// The configuration cannot be written, or the program `haproxy` does not start.
    pub fn start(cluster: &Cluster) -> Result<Self> {
        let port = Port::free();
        let file = cluster.path("haproxy.cfg");
        fs::write(&file, configuration(cluster, port.number())).context("write HAProxy's file")?;
        let mut command = Command::new("haproxy");
        command.arg("-db").arg("-f").arg(&file).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let process = Process::spawn("haproxy", command, &cluster.path("haproxy.log"))?;
        Ok(Self { port, _process: process })
    }

    /// The port that leads to the primary.
    pub fn primary(&self) -> u16 {
        self.port.number()
    }
}

fn configuration(cluster: &Cluster, port: u16) -> String {
    let servers = cluster.nodes.iter().map(|node| {
        let (name, postgres) = (node.name(), node.port());
        let rest = node.rest().port().to_owned();
        format!("    server {name} 127.0.0.1:{postgres} maxconn 100 check port {rest}\n")
    });
    format!(
        "global
    maxconn 100
defaults
    log global
    mode tcp
    retries 2
    timeout client 30m
    timeout connect 4s
    timeout server 30m
    timeout check 5s
listen primary
    bind 127.0.0.1:{port}
    option httpchk OPTIONS /primary
    http-check expect status 200
    default-server inter 3s fall 3 rise 2 on-marked-down shutdown-sessions
{}",
        servers.collect::<String>()
    )
}
