//! etcd processes.
