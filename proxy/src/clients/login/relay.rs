//! Lets the server authenticate the client, through us, whatever the method.

use std::sync::Arc;

use bytes::BytesMut;
use kornak_cluster::discard;
use kornak_protocol::auth::Credentials;
use kornak_protocol::backend::{self, Authentication, BackendKey};
use kornak_protocol::frame::Frame;
use kornak_protocol::params::Parameters;

use super::{Admitted, Login, NotAdmitted, Visitor, client_frame, silent};
use crate::admission::identity::Identity;
use crate::net::backend::{next_frame, put_frame};
use crate::net::stream::{Stream, write_all};
use crate::registry::Entry;
use crate::session::Session;
use crate::session::journal::Pin;

impl Visitor<'_> {
    /// Lets the server authenticate the client.
    pub(super) async fn relay(
        &self,
        mut stream: Stream,
        mut buf: BytesMut,
        entry: &mut Entry,
    ) -> Login<Admitted> {
        stream = self.take_server(stream, entry).await?;
        if let Err(full) = entry.visit.asks() {
            return self.refuse_full(stream, full);
        }
        let opened = self.open(None).await;
        entry.visit.listens();
        let mut opened = match opened {
            Ok(opened) => opened,
            Err(error) => return self.no_server(stream, &error),
        };
        let connected = &mut opened.connected;
        write_all(&mut connected.stream, &self.startup).await.map_err(silent)?;
        let mut params = Parameters::default();
        loop {
            let frame = match next_frame(&mut connected.stream, &mut connected.rest).await {
                Ok(frame) => frame,
                Err(error) => return self.no_server(stream, &error),
            };
            let mut out = BytesMut::new();
            let mut answer_expected = false;
            match frame.tag {
                b'R' => answer_expected = relay_request(&frame, &mut out),
                b'K' => {
                    if let Ok(theirs) = BackendKey::parse(&frame.body) {
                        let ours = self.new_key(entry, theirs.pid);
                        discard::message_fits(ours.put(&mut out));
                        connected.key = Some(theirs);
                    }
                }
                b'S' => {
                    if let Ok((name, value)) = backend::parameter_status(&frame.body) {
                        if name == b"server_version" {
                            self.shared.prober.heard_version(Some(value));
                        }
                        discard::parameter_is_within_bound(params.set(name, value));
                    }
                    put_frame(&frame, &mut out);
                }
                b'E' => {
                    put_frame(&frame, &mut out);
                    return Err(NotAdmitted::Refused(stream, out.freeze()));
                }
                // The server has let it in.
                b'Z' => {
                    let is_superuser = params.get("is_superuser") == Some(b"on");
                    if let Err(full) = entry.visit.enter(self.who(), is_superuser) {
                        return self.refuse_full(stream, full);
                    }
                    put_frame(&frame, &mut out);
                }
                _ => put_frame(&frame, &mut out),
            }
            write_all(&mut stream, &out).await.map_err(silent)?;
            if frame.tag == b'Z' {
                break;
            }
            if answer_expected {
                let answer = client_frame(self.shared, &mut stream, &mut buf).await?;
                out.clear();
                put_frame(&answer, &mut out);
                write_all(&mut connected.stream, &out).await.map_err(silent)?;
            }
        }
        let mut session = Session::new(params);
        session.pin(if self.replication { Pin::Replication } else { Pin::Relay });
        let (user, startup) = (self.user.clone(), self.startup.clone());
        let credentials = Credentials::None;
        let identity = Arc::new(Identity { user, startup, credentials, was_taken: false });
        let opened = Some(opened);
        Ok(Admitted { stream, read: buf, identity, session, opened, member: None })
    }
}

/// Passes a server's request on, without the mechanisms that bind to a channel which ends at us.
/// Answers whether the client has to reply.
fn relay_request(frame: &Frame, out: &mut BytesMut) -> bool {
    match Authentication::parse(&frame.body) {
        Ok(Authentication::Sasl(offered)) => {
            let names: Vec<&str> = offered
                .iter()
                .filter_map(|name| std::str::from_utf8(name).ok())
                .filter(|name| !name.ends_with("-PLUS"))
                .collect();
            // Names that came in a message fit into one.
            discard::message_fits(backend::put_authentication_sasl(&names, out));
            true
        }
        Ok(Authentication::Ok | Authentication::SaslFinal(_)) => {
            put_frame(frame, out);
            false
        }
        _ => {
            put_frame(frame, out);
            true
        }
    }
}
