//! The connection to a member under TLS. The client library's own knows only webpki's idea of a good
//! certificate; here it is [`kornak_tls`]'s, as for every other connection.

use std::error::Error;
use std::sync::Arc;

use etcd_client::Channel;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use kornak_tls::{Authorities, OfServers, Rules, TlsError, certified};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Endpoint, Uri};
use tower::ServiceExt;

use super::PROBE_EVERY;
use crate::etcd::EtcdSettings;
use crate::etcd::convert::{self, Failure};

/// Reads the certificates; the connection is made by the first request.
pub(super) async fn channel(url: &str, settings: &EtcdSettings) -> Result<Channel, Failure> {
    let reading = settings.clone();
    let config = tokio::task::spawn_blocking(move || config(&reading)).await;
    let config = match config {
        Ok(Ok(config)) => Arc::new(config),
        Ok(Err(error)) => return Err(Failure::NotDone(with_causes(&error))),
        Err(error) => return Err(Failure::NotDone(error.to_string())),
    };
    let endpoint = Endpoint::from_shared(url.to_owned());
    let endpoint = endpoint.map_err(|error| Failure::NotDone(error.to_string()))?;
    let endpoint = endpoint
        .connect_timeout(settings.attempt_timeout)
        .timeout(settings.retry_timeout)
        .http2_keep_alive_interval(PROBE_EVERY)
        .keep_alive_timeout(settings.attempt_timeout)
        .keep_alive_while_idle(true);
    let connector = tower::service_fn(move |uri: Uri| connect(uri, Arc::clone(&config)));
    Ok(Channel::Tonic(endpoint.connect_with_connector_lazy(connector)))
}

async fn connect(
    uri: Uri,
    config: Arc<ClientConfig>,
) -> Result<TokioIo<TlsStream<TcpStream>>, Box<dyn Error + Send + Sync>> {
    let host = uri.host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host.to_owned())?;
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_nodelay(true);
    let tcp = http.oneshot(uri).await?.into_inner();
    Ok(TokioIo::new(TlsConnector::from(config).connect(name, tcp).await?))
}

fn config(settings: &EtcdSettings) -> Result<ClientConfig, TlsError> {
    let authorities = match &settings.ca_file {
        Some(file) => Authorities::of_file(file)?,
        None => Authorities::of_this_machine(),
    };
    let verifier = OfServers::new(authorities, Rules::Https, true);
    let own = settings.identity.as_ref();
    let own = own.map(|(certificate, key)| certified(certificate, key, None)).transpose()?;
    let mut config = kornak_tls::client_config(Arc::new(verifier), own)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn with_causes(error: &TlsError) -> String {
    convert::causes(error).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
