//! How members ask each other: requests of the shipped client, answered by the shipped REST API.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::Request;
use hyper::header::HeaderMap;
use kornak_agent::machine::Boxed;
use kornak_agent::peers::{self, Answer, PROMISED, PeerError};
use serde_json::{Value, json};

use super::{Life, pledge_file};
use crate::sim::exec::Reply;
use crate::sim::host::{end, index_of};
use crate::sim::net;
use crate::sim::scenario::Mutation;
use crate::sim::world::World;

/// The way from one member to the others.
#[derive(Debug)]
pub struct Carrier(pub Life);

impl peers::Carrier for Carrier {
    fn carry(
        &self,
        request: Request<Bytes>,
        timeout: Duration,
    ) -> Boxed<Result<Answer, PeerError>> {
        let life = self.0;
        life.ask(async move |w| {
            life.step(&w).await;
            let name = request.uri().host().unwrap_or_default().to_owned();
            let Some(index) = index_of(&w, &name) else {
                return Err(PeerError::Address(request.uri().to_string()));
            };
            let about_a_position = request.uri().path() == "/patroni";
            if let Some(answer) = promised_by_nobody(&w, index, &request) {
                return Ok(answer);
            }
            let other = w.answered_by.borrow().get(&index).copied();
            let to = other.filter(|_| about_a_position).unwrap_or(index);
            let answer = net::call(&w, end(life.host), end(to), timeout, move |w, reply| {
                serve(w, to, request, reply);
            });
            let mut answer = answer.await.ok_or(PeerError::Timeout(timeout))?;
            if about_a_position {
                falsify(&w, &name, &mut answer);
            }
            Ok(answer)
        })
    }
}

/// Hands a request to the agent of a host, as its kernel would: one that is dead resets the connection, one that is
/// frozen answers when it is thawed.
fn serve(w: &Rc<World>, index: usize, request: Request<Bytes>, reply: Reply<Answer>) {
    let host = &w.hosts[index];
    if !host.up.get() {
        return w.net.lose(reply);
    }
    let Some(agent) = host.agent.borrow().clone() else { return };
    let life = Life { host: index, process: agent.process };
    let there = Rc::clone(w);
    w.exec.spawn(agent.process, async move {
        life.step(&there).await;
        reply.give(agent.api.answer(request).await);
    });
}

/// A member's answer about itself, if that is broken on purpose.
fn falsify(w: &World, name: &str, answer: &mut Answer) {
    let mutations = [Mutation::NameNotChecked, Mutation::DownCounts];
    let Some(mutation) = w.plan.mutation.filter(|it| mutations.contains(it)) else { return };
    let Ok(mut said) = serde_json::from_slice::<Value>(&answer.body) else { return };
    if mutation == Mutation::NameNotChecked {
        said["patroni"]["name"] = json!(name);
    } else if said["state"] != json!("running") || said.get("xlog").is_none() {
        said["state"] = json!("running");
        said["xlog"] = json!({"received_location": 1, "replayed_location": 1});
    }
    answer.body = Bytes::from(said.to_string());
}

/// A promise that is not given counts as given, where the member sees a leader.
fn promised_by_nobody(w: &World, index: usize, request: &Request<Bytes>) -> Option<Answer> {
    let fenced = w.hosts[index].disk.borrow().files.contains_key(&pledge_file());
    let careless = match w.plan.mutation {
        Some(Mutation::PromiseForgottenWhileLeaderShows) => true,
        Some(Mutation::FencedAcceptsFailsafe) => fenced,
        _ => false,
    };
    let asks = request.uri().path() == "/failsafe";
    let agent = w.hosts[index].agent.borrow().clone().filter(|_| careless && asks)?;
    let view = Arc::clone(&agent.view.borrow());
    view.get(&w.store.keys.leader()).map(drop).or(fenced.then_some(()))?;
    let mut headers = HeaderMap::new();
    headers.insert(PROMISED, 20_000_u64.into());
    Some(Answer { status: 200, headers, body: Bytes::from_static(b"Accepted") })
}
