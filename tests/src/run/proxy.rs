//! `kornak proxy` as a process.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::TcpStream;

use super::kornak;
use super::lan::Host;
use super::port::Port;
use super::process::Process;
use super::rest::Rest;
use super::scratch::Scratch;
use super::wait::until_true;

/// A running proxy with listeners for the primary, the standbys and the workers, and a status page.
#[derive(Debug)]
pub struct Proxy {
    primary: Port,
    standbys: Port,
    workers: Port,
    status: Port,
    host: Option<Arc<Host>>,
    file: PathBuf,
    log: PathBuf,
    name: String,
    process: Process,
}

impl Proxy {
    /// Starts one on `source`, the part of its file that says where the cluster is: `etcd3: …`, or
    /// nothing if `proxy` (the lines below `proxy:`) names `static` members.
    ///
    /// # Panics
    /// When it does not listen within 15 s.
    pub async fn start(scratch: &Scratch, name: &str, head: &str, proxy: &str) -> Result<Self> {
        Self::start_as(scratch, name, head, "", proxy).await
    }

    /// Starts a proxy; `more` is for the primary's listener: `, pool_mode: transaction`.
    ///
    /// # Panics
    /// When it does not listen within 15 s.
    pub async fn start_as(
        scratch: &Scratch,
        name: &str,
        head: &str,
        more: &str,
        proxy: &str,
    ) -> Result<Self> {
        Self::start_on(scratch, name, head, more, proxy, None).await
    }

    /// Starts a proxy on a host of its own.
    ///
    /// # Panics
    /// When it does not listen within 15 s.
    pub async fn start_on(
        scratch: &Scratch,
        name: &str,
        head: &str,
        more: &str,
        proxy: &str,
        host: Option<Arc<Host>>,
    ) -> Result<Self> {
        let [primary, standbys, workers, status] = Port::several().map(|port: Port| match &host {
            Some(host) => port.at(&host.address()),
            None => port,
        });
        let text = format!(
            "{head}\nproxy:\n  listeners:\n    \
             - {{name: primary, listen: \"{}\", target: primary{more}}}\n    \
             - {{name: standbys, listen: \"{}\", target: standbys}}\n    \
             - {{name: workers, listen: \"{}\", target: workers}}\n  \
             status: {{listen: \"{}\"}}\n{}\n",
            primary.address(),
            standbys.address(),
            workers.address(),
            status.address(),
            indent(proxy),
        );
        let file = scratch.join(&format!("{name}.yml"));
        fs::write(&file, text).context("write the proxy's file")?;
        let log = scratch.join(&format!("{name}.log"));
        let process = Process::spawn(name, Self::command(&file, host.as_deref()), &log)?;
        let name = name.to_owned();
        let mut proxy = Self { primary, standbys, workers, status, host, file, log, name, process };
        proxy.listening().await;
        Ok(proxy)
    }

    fn command(file: &std::path::Path, host: Option<&Host>) -> Command {
        let command = kornak::with_file("proxy", file);
        match host {
            Some(host) => host.run(&command),
            None => command,
        }
    }

    /// Port whose sessions reach the primary.
    pub fn primary(&self) -> u16 {
        self.primary.number()
    }

    pub fn standbys(&self) -> u16 {
        self.standbys.number()
    }

    /// Port whose sessions reach the primaries of a Citus cluster's worker groups.
    pub fn workers(&self) -> u16 {
        self.workers.number()
    }

    /// Status page and `/metrics`.
    pub fn status(&self) -> Rest {
        Rest::new(&self.status.address())
    }

    pub fn file(&self) -> &std::path::Path {
        &self.file
    }

    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Kills it and starts it again on the same ports.
    pub async fn restart(&mut self) -> Result<()> {
        self.process.kill();
        self.begin_again()?;
        self.listening().await;
        Ok(())
    }

    /// Starts it again on the same ports, and does not wait until it listens.
    pub fn begin_again(&mut self) -> Result<()> {
        let command = Self::command(&self.file, self.host.as_deref());
        self.process = Process::spawn(&self.name, command, &self.log)?;
        Ok(())
    }

    async fn listening(&mut self) {
        let address = self.primary.address();
        let process = std::cell::RefCell::new(&mut self.process);
        super::wait::until(Duration::from_secs(15), "the proxy listens", || async {
            if let Some(status) = process.borrow_mut().exited() {
                return Ok(Err(status));
            }
            TcpStream::connect(&address).await.map(|_| Ok(())).map_err(|error| error.to_string())
        })
        .await
        .unwrap_or_else(|status| {
            panic!("the proxy ended ({status}):\n{}", process.borrow().tail(20))
        });
    }

    /// Waits until it has the primary's address: until then logins may be refused.
    pub async fn ready(&self, conninfo: &str, limit: Duration) {
        until_true(limit, "a query through the proxy", || async {
            match super::postgres::connect(conninfo).await {
                Ok(client) => client.simple_query("SELECT 1").await.is_ok(),
                Err(_) => false,
            }
        })
        .await;
    }
}

/// Two spaces before each line.
fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}
