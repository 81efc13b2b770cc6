use super::*;

fn at(text: &str) -> Address {
    Address { host: text.to_owned(), port: 5432 }
}

/// `1 4 a p`: group, node, host, role; `!` behind it: not synced.
fn rows(text: &str) -> Vec<Row> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            Row {
                group: GroupId(words[0].parse().unwrap()),
                node: words[1].parse().unwrap(),
                address: at(words[2]),
                role: if words[3].starts_with('p') { Role::Primary } else { Role::Secondary },
                synced: !words[3].ends_with('!'),
            }
        })
        .collect()
}

/// `1 a b (c)`: group, primary (`-`: unknown), secondaries, one that does not run.
fn wanted(text: &str) -> Wanted {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(|line| {
            let mut words = line.split_whitespace();
            let group = GroupId(words.next().unwrap().parse().unwrap());
            let primary = words.next().filter(|word| *word != "-").map(at);
            let (resting, running): (Vec<&str>, Vec<&str>) =
                words.partition(|word| word.starts_with('('));
            let resting = resting.iter().map(|word| at(word.trim_matches(['(', ')']))).collect();
            let secondaries = running.into_iter().map(at).collect();
            (group, Group { primary, secondaries, resting })
        })
        .collect()
}

fn show(step: &Step) -> String {
    match step {
        Step::Update { node, to } => format!("{node}={}", to.host),
        Step::SetCoordinator { address } => format!("coordinator={}", address.host),
        Step::Add { group, address, role } => {
            format!("+{group}:{}:{}", address.host, role.as_str())
        }
        Step::Remove { group, address } => format!("-{group}:{}", address.host),
    }
}

/// Runs what the plan says on the rows as Citus would, and checks that it was possible.
fn run(mut rows: Vec<Row>, steps: &[Step]) -> Vec<Row> {
    for step in steps {
        let Step::Update { node, to } = step else { panic!("{step:?} among updates") };
        let taken = rows.iter().any(|row| row.address == *to && row.node != *node);
        assert!(!taken, "{step:?} takes an address that is taken: {rows:?}");
        rows.iter_mut().find(|row| row.node == *node).expect("a row").address = to.clone();
    }
    rows
}

fn check(before: &str, want: &str, expected: &str) {
    let (rows, wanted) = (rows(before), wanted(want));
    let steps = updates(&rows, &wanted);
    let shown: Vec<String> = steps.iter().map(show).collect();
    assert_eq!(shown.join(" "), expected, "updates of {before:?} to {want:?}");
    let after = run(rows, &steps);
    assert_eq!(updates(&after, &wanted), [], "done twice is done once");
}

fn check_membership(before: &str, want: &str, expected: &str) {
    let (rows, wanted) = (rows(before), wanted(want));
    assert_eq!(updates(&rows, &wanted), [], "updates come first");
    let step = membership(&rows, &wanted, &BTreeSet::new());
    assert_eq!(step.as_ref().map(show).unwrap_or_default(), expected);
}

#[test]
fn what_agrees_is_left_alone() {
    check("0 1 c p\n1 2 a p\n1 3 b s", "0 c\n1 a b", "");
    check_membership("0 1 c p\n1 2 a p\n1 3 b s", "0 c\n1 a b", "");
    assert_eq!(differences(&rows("0 1 c p\n1 2 a p"), &wanted("0 c\n1 a")), Vec::<String>::new());
}

#[test]
fn servers_that_trade_places_trade_rows_and_the_primary_gives_way_first() {
    check("1 4 a p\n1 5 b s", "1 b a", "4=a-demoted 5=a 4=b");
}

#[test]
fn the_new_primarys_row_takes_the_old_ones_address_while_that_is_away() {
    check("1 4 a p\n1 5 b s", "1 b", "4=a-demoted 5=a 4=b");
}

#[test]
fn what_a_switchover_began_is_finished() {
    check("1 4 a-demoted p\n1 5 b s", "1 b", "5=a 4=b");
    check("1 4 a-demoted p\n1 5 b s", "1 b a", "5=a 4=b");
    check("1 4 a-demoted p\n1 5 b s", "1 a b", "4=a");
}

#[test]
fn a_primary_that_was_no_secondary_is_put_into_the_primarys_row() {
    check("1 4 a p", "1 b", "4=b");
    check("1 4 a p\n1 5 c s", "1 b c", "4=b");
}

#[test]
fn a_new_standby_gets_the_row_of_one_that_is_gone() {
    check("1 4 a p\n1 5 b s", "1 a c", "5=c");
    check("1 4 a p\n1 5 b s", "1 b c", "5=c 4=b");
}

#[test]
fn a_pod_that_comes_back_with_another_address_is_followed() {
    check("1 4 10.0.0.1 p\n1 5 10.0.0.2 s", "1 10.0.0.9 10.0.0.2", "4=10.0.0.9");
    check("0 1 c p\n1 4 a p", "0 d\n1 a", "1=d");
}

#[test]
fn an_address_that_moved_to_another_group_is_given_up_there_first() {
    check("1 4 a p\n2 5 b p", "1 b\n2 a", "4=a-demoted 5=a 4=b");
    // Nobody leads group 2, so its row only gives way.
    check("1 4 a p\n2 5 b p", "1 b\n2 -", "5=b-parked-5 4=b");
}

#[test]
fn a_group_without_a_known_leader_is_left_as_it_is() {
    check("1 4 a p\n1 5 b s", "1 -", "");
    check_membership("1 4 a p\n1 5 b s", "1 - c", "");
}

#[test]
fn three_members_whose_roles_all_change() {
    check("1 4 a p\n1 5 b s\n1 6 c s", "1 c a b", "4=a-demoted 6=a 4=c");
    check("1 4 a p\n1 5 b s\n1 6 c s", "1 d e f", "4=d 5=e 6=f");
}

#[test]
fn a_standby_that_restarts_keeps_its_row_and_gets_none_before_it_runs() {
    check("1 4 a p\n1 5 b s", "1 a (b)", "");
    check_membership("1 4 a p\n1 5 b s", "1 a (b)", "");
    check_membership("1 4 a p", "1 a (b)", "");
    check("1 4 a p\n1 5 b s", "1 b (a)", "4=a-demoted 5=a 4=b");
    check("1 4 a p\n1 5 b s\n1 6 c s", "1 c (a) b", "4=a-demoted 6=a 4=c");
}

#[test]
fn primaries_are_added_first_and_gone_rows_removed_before_standbys_are_added() {
    check_membership("", "0 c\n1 a b", "coordinator=c");
    check_membership("0 1 c p", "0 c\n1 a b", "+1:a:primary");
    check_membership("0 1 c p\n1 4 a p\n1 5 x s", "0 c\n1 a", "-1:x");
    check_membership("0 1 c p\n1 4 a p", "0 c\n1 a b", "+1:b:secondary");
    check_membership("0 1 c p\n2 4 a p", "0 c\n2 -\n3 d", "+3:d:primary");
}

#[test]
fn a_group_that_is_gone_is_removed_primary_first_and_the_coordinator_never() {
    check_membership("0 1 c p\n3 4 a p\n3 5 b s", "0 c", "-3:a");
    check_membership("0 1 c p\n3 5 b s", "0 c", "-3:b");
    check_membership("0 1 c p\n1 4 a p", "1 a", "");
}

#[test]
fn a_row_that_citus_refuses_does_not_keep_others_waiting() {
    for (before, want, refused, next) in [
        ("0 1 c p\n3 4 a p", "0 c x", "a", "+0:x:secondary"),
        ("0 1 c p", "0 c\n1 a\n2 b", "a", "+2:b:primary"),
        ("0 1 c p\n1 4 a p", "0 c\n1 a x y", "x", "+1:y:secondary"),
    ] {
        let step = membership(&rows(before), &wanted(want), &BTreeSet::from([at(refused)]));
        assert_eq!(step.as_ref().map(show).as_deref(), Some(next), "{refused} is refused");
    }
}

#[test]
fn what_does_not_agree_is_said() {
    let differ = |before, want| differences(&rows(before), &wanted(want)).join("; ");
    assert_eq!(
        differ("0 1 c p\n1 4 a p\n1 5 x s\n3 6 z p", "0 c\n1 b y\n2 d"),
        "group 1 is registered at a:5432, its primary is b:5432; \
         group 1 has a standby y:5432 that is not registered; \
         group 1 has a registered standby x:5432 that is gone; \
         group 2 is not registered; group 3 is registered and is gone"
    );
}

/// Any change of roles and addresses in three groups is planned so that it can be carried out.
#[test]
fn every_change_can_be_carried_out() {
    let mut dice = 7_u64;
    let mut roll = |sides: u64| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (dice >> 33) % sides
    };
    for _ in 0..3_000 {
        let mut state = |known: bool| -> (Vec<Row>, Wanted) {
            let mut hosts: Vec<u64> = (0..12).collect();
            let (mut rows, mut wanted, mut node) = (Vec::new(), Wanted::new(), 0);
            for group in 0..3 {
                let mut want = Group::default();
                for member in 0..=roll(4) {
                    let host = hosts.remove(roll(hosts.len() as u64) as usize);
                    let suffix = if member == 0 && known && roll(6) == 0 { DEMOTED } else { "" };
                    let address = at(&format!("h{host}{suffix}"));
                    node += 1;
                    let role = if member == 0 { Role::Primary } else { Role::Secondary };
                    if member > 0 {
                        want.secondaries.insert(address.clone());
                    } else if roll(5) > 0 {
                        want.primary = Some(address.clone());
                    }
                    rows.push(Row { node, group: GroupId(group), address, role, synced: true });
                }
                wanted.insert(GroupId(group), want);
            }
            (rows, wanted)
        };
        let (rows, _) = state(true);
        let (_, wanted) = state(false);
        let steps = updates(&rows, &wanted);
        let after = run(rows, &steps);
        assert_eq!(updates(&after, &wanted), [], "{after:?} is not yet {wanted:?}");
        for (group, want) in &wanted {
            let row = after.iter().find(|row| row.group == *group && row.role == Role::Primary);
            if let Some(primary) = &want.primary {
                assert_eq!(row.map(|row| &row.address), Some(primary));
            }
        }
    }
}
