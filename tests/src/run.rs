//! Real processes, owned and reaped: whatever a test starts is gone when the test ends, even if
//! the test is killed.

pub mod etcd;
