//! From a file's settings to a client of the store.

use std::sync::Arc;

use anyhow::bail;
use kornak_cluster::discard;
use kornak_config::{Scheme, StoreSettings};
use kornak_dcs::Dcs;
use kornak_dcs::etcd::{EtcdDcs, EtcdSettings};
use kornak_dcs::memory::MemoryDcs;
use secrecy::ExposeSecret;

/// Makes the client. Nothing is connected yet, except that the TLS provider is installed. To be
/// called within the runtime that will use the store.
///
/// # Errors
/// A certificate without its key.
pub fn connect(settings: &StoreSettings) -> anyhow::Result<Arc<dyn Dcs>> {
    let etcd = match settings {
        StoreSettings::Memory => return Ok(Arc::new(MemoryDcs::default())),
        StoreSettings::Etcd3(etcd) => etcd,
    };
    install_tls();
    let identity = match (&etcd.cert, &etcd.key) {
        (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
        (None, None) => None,
        _ => bail!("etcd3: expected both cert and key"),
    };
    let password = etcd.password.as_ref().map(ExposeSecret::expose_secret).unwrap_or_default();
    Ok(Arc::new(EtcdDcs::new(EtcdSettings {
        tls: etcd.protocol == Scheme::Https,
        user: etcd.username.as_ref().map(|user| (user.clone(), password.to_owned())),
        ca_file: etcd.cacert.clone(),
        identity,
        ..EtcdSettings::new(etcd.hosts.iter().map(ToString::to_string).collect())
    })))
}

/// Chooses the one implementation of cryptography for the whole process.
pub fn install_tls() {
    // A second call changes nothing, which is what is wanted.
    discard::only_helps(rustls::crypto::aws_lc_rs::default_provider().install_default());
}
