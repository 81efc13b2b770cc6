//! Members in the order and with the indentation of who streams from whom.

use crate::view::MemberView;

/// The leader, its standbys below it, and below each those that name it in `replicatefrom`. Members
/// of a circle, which stream from nobody, are left out, as patronictl does.
pub(super) fn sorted(members: &[MemberView]) -> Vec<MemberView> {
    let leader = members.iter().find(|member| member.is_leader());
    let parent = |member: &MemberView| {
        let named = member.tags.0.get("replicatefrom").and_then(serde_json::Value::as_str);
        let named = named.filter(|name| {
            *name != member.name
                && members.iter().any(|other| other.name == *name && !other.is_leader())
        });
        named.map(str::to_owned).or_else(|| leader.map(|leader| leader.name.clone()))
    };
    let below = |name: Option<&str>| -> Vec<&MemberView> {
        let standbys = members.iter().filter(|member| !member.is_leader());
        standbys.filter(|member| parent(member).as_deref() == name).collect()
    };
    let mut out: Vec<MemberView> = leader.into_iter().cloned().collect();
    // Depth first; the stack holds what is still to come, the next at its end.
    let level = 1;
    let first = below(leader.map(|leader| leader.name.as_str()));
    let mut stack: Vec<(usize, &MemberView)> =
        first.into_iter().rev().map(|it| (level, it)).collect();
    while let Some((level, member)) = stack.pop() {
        let name = format!("{}+ {}", " ".repeat((level - 1) * 2), member.name);
        out.push(MemberView { name, ..member.clone() });
        let next = below(Some(&member.name)).into_iter().rev();
        stack.extend(next.map(|it| (level + 1, it)));
    }
    out
}

#[cfg(test)]
mod tests {
    use kornak_cluster::Tags;
    use serde_json::json;

    use super::*;

    fn names(members: &[(&str, &str, &str)]) -> Vec<String> {
        let member = |(name, role, from): &(&str, &str, &str)| MemberView {
            name: (*name).to_owned(),
            role: (*role).to_owned(),
            tags: Tags(json!({"replicatefrom": from}).as_object().cloned().unwrap_or_default()),
            ..MemberView::default()
        };
        let members: Vec<MemberView> = members.iter().map(member).collect();
        sorted(&members).into_iter().map(|member| member.name).collect()
    }

    #[test]
    fn standbys_lie_below_those_they_stream_from() {
        let found = names(&[
            ("a", "replica", "c"),
            ("b", "leader", "a"),
            ("c", "sync_standby", "nobody"),
            ("d", "replica", "a"),
            ("e", "replica", "b"),
        ]);
        assert_eq!(found, ["b", "+ c", "  + a", "    + d", "+ e"]);
        assert_eq!(names(&[("a", "replica", ""), ("b", "replica", "a")]), ["+ a", "  + b"]);
        assert_eq!(
            names(&[("a", "replica", "b"), ("b", "replica", "a"), ("l", "leader", "")]),
            ["l"]
        );
    }
}
