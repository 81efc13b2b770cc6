//! The watchdog device, played by the test: what it hears, and that it would have fired in time.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kornak_tests::run::agent::{AgentSpec, Node, Program};
use kornak_tests::run::etcd::Etcd;
use kornak_tests::run::postgres::describe;
use kornak_tests::run::scratch::Scratch;
use kornak_tests::run::wait::until;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

/// A pipe in the place of `/dev/watchdog`.
struct Device {
    pipe: std::fs::File,
    heard: String,
    last: Instant,
}

impl Device {
    fn new(path: &Path) -> Result<Self> {
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            path,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        )
        .context("make a pipe")?;
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let pipe = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        Ok(Self { pipe, heard: String::new(), last: Instant::now() })
    }

    /// Listens until what was heard is as asked for, or for the whole time.
    async fn listen(&mut self, limit: Duration, mut enough: impl FnMut(&Self) -> bool) -> bool {
        let end = Instant::now() + limit;
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        while Instant::now() < end {
            ticks.tick().await;
            let mut buffer = [0; 256];
            if let Ok(bytes @ 1..) = self.pipe.read(&mut buffer) {
                self.heard.push_str(&String::from_utf8_lossy(&buffer[..bytes]));
                self.last = Instant::now();
            }
            if enough(self) {
                return true;
            }
        }
        false
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_watchdog_hears_of_each_proof_and_would_fire_when_the_agent_is_frozen() -> Result<()> {
    let mut scratch = Scratch::new("watchdog");
    let path = scratch.server_dir("device").join("watchdog");
    let etcd = Etcd::start(1).await?;
    let spec = AgentSpec {
        scope: "watched".to_owned(),
        name: "w0".to_owned(),
        etcd: etcd.endpoints(),
        ttl: 8,
        failsafe: true,
        // The device is to be heard of, not another agent.
        agent_timeout: Some(0),
        watchdog: vec![
            "mode: required".to_owned(),
            "driver: testing".to_owned(),
            format!("device: {}", path.display()),
            "safety_margin: 4".to_owned(),
        ],
        ..AgentSpec::default()
    };
    let mut device = Device::new(&path)?;
    let node = Node::start(&scratch, &spec, Program::Kornak)?;
    until(LIMIT, "the node takes writes", || async {
        let client = node.connect().await.map_err(|error| describe(&error))?;
        client.batch_execute("CREATE TABLE IF NOT EXISTS t (i int)").await.map_err(|e| describe(&e))
    })
    .await;
    let on =
        device.listen(LIMIT, |it| it.heard.contains("Ctimeout=4\n") && it.heard.ends_with('1'));
    assert!(on.await, "{:?}", device.heard);

    // Maintenance mode switches it off in order, and its end on again.
    assert_eq!(node.rest().patch("/config", &json!({"pause": true})).await?.code, 200);
    assert!(device.listen(LIMIT, |it| it.heard.ends_with('V')).await, "{:?}", device.heard);
    device.heard.clear();
    assert_eq!(node.rest().patch("/config", &json!({"pause": null})).await?.code, 200);
    let on =
        device.listen(LIMIT, |it| it.heard.contains("Ctimeout=4\n") && it.heard.ends_with('1'));
    assert!(on.await, "{:?}", device.heard);

    // A frozen agent says nothing: after four seconds the host would have been reset.
    node.freeze_agent()?;
    let timeout = Duration::from_secs(4);
    assert!(device.listen(LIMIT, |it| it.last.elapsed() > timeout).await, "it goes on");
    assert!(!device.heard.ends_with('V'), "it was not switched off: {:?}", device.heard);
    node.thaw_agent()?;
    let back =
        device.listen(LIMIT, |it| it.last.elapsed() < timeout / 4 && it.heard.ends_with('1'));
    assert!(back.await, "{:?}", device.heard);
    drop(node);
    scratch.passed();
    Ok(())
}
