//! Clients: each has one thing under way, thinks, and believes what it is told.

use std::rc::Rc;

use super::proxy::{self, Said};
use super::world::World;

/// Answers that the clients of a world were given.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    pub done: u32,
    pub unknown: u32,
    pub not_done: u32,
}

/// One client of one proxy, for as long as the world lasts.
pub async fn run(w: Rc<World>, proxy: usize, session: u64) {
    loop {
        w.exec.sleep(w.rng.millis(20, 500)).await;
        let record = w.next_number();
        let in_transaction = w.rng.chance(300);
        let said = proxy::submit(&w, proxy, session, record, in_transaction).await;
        let mut tally = w.tally.get();
        match said {
            Said::Done => {
                tally.done += 1;
                w.checker.borrow_mut().told_done(&w, record);
            }
            Said::Unknown => tally.unknown += 1,
            Said::NotDone => {
                tally.not_done += 1;
                w.checker.borrow_mut().told_not_done(&w, record);
            }
        }
        w.tally.set(tally);
    }
}
