//! The API over real sockets.

use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;

const SOON: Duration = Duration::from_secs(10);

/// A node at a free port.
pub(super) struct Served {
    pub(super) address: SocketAddr,
    pub(super) views: watch::Sender<Arc<NodeView>>,
    pub(super) stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

pub(super) async fn served(
    view: NodeView,
    settings: ApiSettings,
    driver: impl Fn(Command) + Send + 'static,
) -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (views, seen) = watch::channel(Arc::new(view));
    let (commands, mut queue) = mpsc::channel(COMMAND_QUEUE);
    tokio::spawn(async move {
        while let Some(command) = queue.recv().await {
            driver(command);
        }
    });
    let stop = CancellationToken::new();
    let task =
        tokio::spawn(serve(listener, Arc::new(Api::new(seen, commands, settings)), stop.clone()));
    Served { address, views, stop, task }
}

async fn exchange(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let read = stream.read_to_string(&mut answer);
    tokio::time::timeout(SOON, read).await.unwrap().unwrap();
    answer
}

#[tokio::test]
async fn a_load_balancer_of_http_1_0_is_understood() {
    let node = served(primary(), settings(), |command| panic!("{command:?}")).await;
    let answer = exchange(node.address, "OPTIONS / HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
    let answer = exchange(node.address, "HEAD /replica HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 503 Service Unavailable\r\n"), "{answer}");
    assert!(answer.ends_with("\r\n\r\n"), "{answer}");
    let answer = exchange(node.address, "GET /primary HTTP/1.0\r\n\r\n").await;
    assert!(answer.ends_with("\"name\": \"pg2\"}}"), "{answer}");
    node.views.send_replace(Arc::new(standby()));
    let answer = exchange(node.address, "OPTIONS / HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 503"), "{answer}");
}

#[tokio::test]
async fn garbage_and_silence_leave_the_others_served() {
    let node = served(primary(), settings(), |command| panic!("{command:?}")).await;
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(TcpStream::connect(node.address).await.unwrap());
    }
    let answer = exchange(node.address, "\0\0\0\x08\x04\x52\x16\x2f\r\n\r\n").await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{answer}");
    let answer = exchange(node.address, "GET /health HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
}

#[tokio::test]
async fn stopping_lets_the_answer_under_way_finish() {
    let (asked, mut waiting) = mpsc::unbounded_channel();
    let driver = move |command| drop(asked.send(command));
    let node = served(standby(), settings(), driver).await;
    let request = "POST /restart HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n";
    let address = node.address;
    let client = tokio::spawn(async move { exchange(address, request).await });
    let Some(Command::Restart { answer, .. }) = waiting.recv().await else { panic!("no restart") };
    node.stop.cancel();
    answer.send(Ok("restarted successfully".to_owned())).unwrap();
    assert!(client.await.unwrap().ends_with("restarted successfully"));
    tokio::time::timeout(SOON, node.task).await.unwrap().unwrap();
    assert!(TcpStream::connect(node.address).await.is_err());
}

#[tokio::test]
async fn stopping_does_not_wait_for_the_silent() {
    let node = served(standby(), settings(), |command| panic!("{command:?}")).await;
    let _silent = TcpStream::connect(node.address).await.unwrap();
    let answer = exchange(node.address, "GET /health HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    let start = Instant::now();
    node.stop.cancel();
    tokio::time::timeout(SOON, node.task).await.unwrap().unwrap();
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_planned_restart_happens_at_its_time_unless_the_server_was_restarted() {
    let (asked, mut waiting) = mpsc::unbounded_channel();
    let driver = move |command| drop(asked.send(command));
    let node = served(standby(), settings(), driver).await;
    let client = peers(None);
    let url = format!("http://{}/restart", node.address);
    let plan = async |millis| {
        let at = jiff::Timestamp::now() + Duration::from_millis(millis);
        let body = json!({"schedule": at.to_string(), "timeout": 5});
        client.post_json(&url, &body, SOON).await.unwrap().status
    };
    assert_eq!(plan(700).await, 202);
    assert_eq!(plan(3_600_000).await, 409);
    let restarted = Some("2026-11-23 00:00:00.000000+00:00".to_owned());
    let restarted = NodeView { postmaster_start_time: restarted, ..standby() };
    node.views.send_replace(Arc::new(restarted));
    // The plan is for another server: once it is gone there is room for the next.
    let deadline = Instant::now() + SOON;
    while plan(200).await != 202 {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let command = tokio::time::timeout(SOON, waiting.recv()).await.unwrap().unwrap();
    let Command::Restart { timeout, .. } = command else { panic!("{command:?}") };
    assert_eq!(timeout, Some(Duration::from_secs(5)));
}
