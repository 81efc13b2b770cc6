//! `POST /citus` and `POST /mpp`: another group's leader says what happens to it.
//!
//! Patroni's senders look at the status alone and are always told 200; ours says what became of it,
//! for its leader holds clients meanwhile.

use std::time::Duration;

use axum::http::StatusCode;
use axum::response::Response;
use kornak_cluster::{GroupId, Moment, Revision};
use serde_json::{Map, Value};

use super::text;
use crate::citus::Desk;
use crate::citus::flight::{Answer, Event, Request};

/// Patroni's, where a sender does not say.
const TIMEOUT: Duration = Duration::from_secs(30);
const COOLDOWN: Duration = Duration::from_secs(10);

pub(super) async fn told(desk: Option<&Desk>, body: &Map<String, Value>, now: Moment) -> Response {
    let Some(request) = read(body, now) else {
        let expected =
            "expected type (before_demote, before_promote, after_promote), group and leader";
        return text(StatusCode::BAD_REQUEST, expected);
    };
    let answer = match desk {
        Some(desk) => desk.ask(&request).await,
        None => Answer::NotHere,
    };
    match (answer, request.hold) {
        (Answer::Done, _) | (_, None) => text(StatusCode::OK, "OK"),
        (answer, Some(_)) => text(StatusCode::SERVICE_UNAVAILABLE, sentence(answer)),
    }
}

fn sentence(answer: Answer) -> &'static str {
    match answer {
        Answer::Done => "OK",
        Answer::Busy => "another group's switchover is under way",
        Answer::Late => "transactions on the coordinator kept their locks",
        Answer::NotHere => "this node does not lead the coordinator's group",
        Answer::Failed => "the coordinator's server refused, see the log of its agent",
    }
}

fn read(body: &Map<String, Value>, now: Moment) -> Option<Request> {
    let event = match body.get("type")?.as_str()? {
        "before_demote" => Event::BeforeDemote,
        "before_promote" => Event::BeforePromote,
        "after_promote" => Event::AfterPromote,
        _ => return None,
    };
    let seconds = |key: &str| {
        let number = body.get(key)?.as_f64()?;
        (number.is_finite() && number >= 0.0).then(|| Duration::from_secs_f64(number.min(3600.0)))
    };
    let ours = body.get("kornak").and_then(Value::as_object);
    let number = |key: &str| ours.and_then(|ours| ours.get(key)?.as_u64());
    Some(Request {
        event,
        group: GroupId(u32::try_from(body.get("group")?.as_u64()?).ok()?),
        leader: body.get("leader")?.as_str()?.to_owned(),
        received: now,
        timeout: seconds("timeout").unwrap_or(TIMEOUT),
        cooldown: seconds("cooldown").unwrap_or(COOLDOWN),
        hold: number("hold_ms").map(Duration::from_millis),
        record: number("record").map_or(Revision::NONE, Revision),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Option<Request> {
        let body: Value = serde_json::from_str(text).unwrap();
        read(body.as_object().unwrap(), Moment::at_millis(5))
    }

    #[test]
    fn patronis_notifications_and_ours_are_understood() {
        let patronis =
            r#"{"type":"before_demote","group":1,"leader":"work1-1","timeout":30,"cooldown":10}"#;
        let request = parsed(patronis).unwrap();
        assert_eq!((request.event, request.group), (Event::BeforeDemote, GroupId(1)));
        assert_eq!((request.timeout, request.cooldown), (TIMEOUT, COOLDOWN));
        assert_eq!((request.hold, request.record), (None, Revision::NONE));
        let ours = r#"{"type":"after_promote","group":2,"leader":"x","kornak":{"hold_ms":800,"record":7}}"#;
        let request = parsed(ours).unwrap();
        assert_eq!((request.hold, request.record), (Some(Duration::from_millis(800)), Revision(7)));
        for nonsense in [
            r#"{"type":"dance","group":1,"leader":"a"}"#,
            r#"{"type":"after_promote","group":-1,"leader":"a"}"#,
            r#"{"type":"after_promote","group":1}"#,
        ] {
            assert_eq!(parsed(nonsense), None);
        }
    }
}
