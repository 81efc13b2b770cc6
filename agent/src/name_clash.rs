//! Whether another node of this cluster runs under our name. Two of them would overwrite each other's
//! account of itself, and take each other's leadership for their own.

use std::time::Duration;

use hyper::Method;
use kornak_cluster::{Member, Scope};
use kornak_config::agent::AgentSettings;
use kornak_dcs::Dcs;
use kornak_dcs::keys::Keys;
use serde_json::Value;

use crate::RunError;
use crate::peers::Peers;

/// The longest the store may take: an agent that starts without it has other things to do.
const STORE_LIMIT: Duration = Duration::from_secs(1);

/// The longest the other one may take. Patroni's constant.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// Refuses to be the second node of a name.
///
/// # Errors
/// There is one, or the files that members are asked with cannot be used.
pub(crate) async fn refuse(settings: &AgentSettings, store: &dyn Dcs) -> Result<(), RunError> {
    let peers = Peers::new(&settings.ctl)?;
    match find(store, &peers, &settings.scope, &settings.name).await {
        Some(base) => Err(RunError::Namesake { name: settings.name.clone(), base }),
        None => Ok(()),
    }
}

/// The REST address of a node that answers to `name`, if there is one. It may be the address that we
/// will show: we do not listen yet.
async fn find(store: &dyn Dcs, peers: &Peers, scope: &Scope, name: &str) -> Option<String> {
    let key = Keys::new(scope).member(name);
    let view = tokio::time::timeout(STORE_LIMIT, store.range(&key)).await.ok()?.ok()?;
    let member: Member = serde_json::from_str(&view.get(&key)?.value).ok()?;
    let answer = peers.send(Method::GET, &member.api_url, None, ANSWER_LIMIT).await.ok()?;
    let said: Value = serde_json::from_slice(&answer.body).ok()?;
    let is = |key, ours: &str| said.pointer(key).and_then(Value::as_str) == Some(ours);
    // The address may be another node's by now.
    let same = is("/patroni/name", name) && is("/patroni/scope", &scope.name);
    same.then(|| member.api_base().to_owned())
}

#[cfg(test)]
mod tests {
    use kornak_config::agent::CtlSettings;
    use kornak_dcs::memory::MemoryDcs;
    use kornak_dcs::{Op, Txn};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// Answers once with this account of a node.
    async fn node(name: &str, scope: &str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let body = format!(r#"{{"patroni":{{"name":"{name}","scope":"{scope}"}}}}"#);
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await;
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all((head + &body).as_bytes()).await.unwrap();
        });
        format!("http://{address}")
    }

    async fn found(base: &str) -> Option<String> {
        let (store, scope) = (MemoryDcs::new(), Scope::new("service", "demo", None));
        let member = format!(
            r#"{{"conn_url":"postgres://h:1/postgres","api_url":"{base}/patroni","state":"running","role":"replica"}}"#
        );
        let put = Op::put(Keys::new(&scope).member("a"), member);
        store.txn(Txn::just(put)).await.unwrap();
        let peers = Peers::new(&CtlSettings::default()).unwrap();
        assert_eq!(find(&store, &peers, &scope, "b").await, None, "nobody has that name");
        find(&store, &peers, &scope, "a").await
    }

    #[tokio::test]
    async fn only_a_living_node_of_the_same_name_and_cluster_counts() {
        let living = node("a", "demo").await;
        assert_eq!(found(&living).await.as_deref(), Some(living.as_str()));
        for (name, scope) in [("b", "demo"), ("a", "other")] {
            let other = node(name, scope).await;
            assert_eq!(found(&other).await, None, "{name} of {scope}");
        }
        assert_eq!(found("http://127.0.0.1:1").await, None, "nobody is there");
    }
}
