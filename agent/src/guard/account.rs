//! Runs a program as another account of the operating system, with all of its groups: a server may read its key only as a
//! member of one (Debian's `ssl-cert`).

use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// Has the child become this account before it runs its program. `std` has only a way that drops all other groups.
#[expect(unsafe_code, reason = "code between fork and exec: only system calls, no allocation")]
pub(crate) fn run_as(command: &mut Command, uid: u32, gid: u32, groups: &[u32]) {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    let mut all = vec![gid];
    all.extend(groups.iter().copied().map(Gid::from_raw).filter(|group| *group != gid));
    let switch = move || {
        set_thread_groups(&all)?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    };
    // SAFETY: the closure runs in the forked child, which has one thread, before exec and makes system calls only;
    // it neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(switch);
    }
}
