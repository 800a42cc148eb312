//! HTTP for app servers and for the enrolment of devices, on one port, routed by path alone.
//!
//! Owns the listeners and the table of paths. Bytes are judged by the codecs of `martlet_proto::http`; status codes are decided
//! in this folder (app servers) and in [`crate::enroll`] (devices), nowhere else.
//!
//! | file | what |
//! | --- | --- |
//! | `config` | bounds |
//! | `listener` | accept, TLS, drain; HTTP/1.1 connections |
//! | `http2` | HTTP/2 connections |
//! | `body` | bodies within bounds |
//! | `answer` | the rules every answer keeps |
//! | `send` | `/gcm/send`, `/fcm/send`: what became of the targets -> status and body |
//! | `notification` | `/gcm/notification`, `/fcm/notification`: device groups |
//! | `iid` | `/iid/…`: topics of tokens, and what a token is |
//!
//! Everything that GCM serves over HTTP is here.

mod answer;
mod body;
mod config;
pub(crate) mod http2;
mod iid;
mod listener;
mod notification;
mod send;

use std::{net::IpAddr, sync::Arc};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming};
use martlet_proto::message::SenderId;

pub use self::config::HttpConfig;
use self::iid::IidPath;
pub(crate) use self::{answer::Answer, body::Room, listener::serve};
use crate::{
    admit::Admit,
    clock::Clock,
    enroll::{self, EnrollConfig},
    entropy::Entropy,
    metrics::{Endpoint, Metrics, RequestLabel},
    project_rate::ProjectRate,
    route::Route,
};

/// Everything a request needs.
#[derive(Debug)]
pub(crate) struct Http {
    pub(crate) config: HttpConfig,
    pub(crate) enroll: EnrollConfig,
    pub(crate) route: Route,
    pub(crate) admit: Arc<Admit>,
    pub(crate) project_rate: ProjectRate,
    /// Of app servers, whose key is known before their body is read.
    pub(crate) room: Room,
    /// Of devices, who are nobody before their body is read: they must not take the room of app servers.
    pub(crate) device_room: Room,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) entropy: Arc<Entropy>,
    pub(crate) metrics: Arc<Metrics>,
}

/// A path that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path<'a> {
    Send,
    Notification,
    Checkin,
    Register,
    Installations { project: &'a str },
    Iid(IidPath<'a>),
}

impl<'a> Path<'a> {
    fn parse(path: &'a str) -> Option<Self> {
        match path.strip_suffix('/').unwrap_or(path) {
            "/gcm/send" | "/fcm/send" => Some(Self::Send),
            "/gcm/notification" | "/fcm/notification" => Some(Self::Notification),
            "/checkin" => Some(Self::Checkin),
            "/c2dm/register3" | "/c2dm/register" => Some(Self::Register),
            path if path.starts_with("/iid/") => IidPath::parse(&path[5..]).map(Self::Iid),
            path => {
                let project = path.strip_prefix("/v1/projects/")?.strip_suffix("/installations")?;
                (!project.is_empty() && !project.contains('/')).then_some(Self::Installations { project })
            }
        }
    }

    /// The methods that it takes.
    fn allow(self) -> &'static str {
        match self {
            Self::Iid(path) => path.allow(),
            Self::Notification => "GET, POST",
            _ => "POST",
        }
    }

    fn endpoint(self) -> Endpoint {
        match self {
            Self::Send => Endpoint::Send,
            Self::Notification => Endpoint::Group,
            Self::Checkin => Endpoint::Checkin,
            Self::Register => Endpoint::Register,
            Self::Installations { .. } => Endpoint::Installation,
            Self::Iid(_) => Endpoint::Iid,
        }
    }
}

impl Http {
    /// Counts what a project sends to so many targets. Where it sends too much, how many seconds it is to wait.
    fn too_much(&self, sender: &SenderId, targets: usize) -> Option<u32> {
        let wait = self.project_rate.take(sender, targets).err()?;
        let secs = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        Some(u32::try_from(secs).unwrap_or(u32::MAX))
    }

    /// Answers one request.
    pub(crate) async fn answer(&self, request: Request<Incoming>, peer: IpAddr) -> Response<Full<Bytes>> {
        let begun = self.clock.now();
        let (head, body) = request.into_parts();
        let path = Path::parse(head.uri.path());
        let answer = match path {
            None => Answer::not_found(),
            Some(path) if !path.allow().split(", ").any(|method| head.method == method) => {
                Answer::method_not_allowed(path.allow())
            }
            Some(Path::Notification) => Box::pin(notification::notification(self, &head, body)).await,
            Some(Path::Send) => Box::pin(send::send(self, &head, body)).await,
            Some(Path::Iid(path)) => Box::pin(iid::answer(self, path, &head, body)).await,
            Some(Path::Checkin) => enroll::checkin(self, &head, body, peer).await,
            Some(Path::Register) => Box::pin(enroll::register(self, &head, body, peer)).await,
            Some(Path::Installations { project }) => enroll::install(self, project, body, peer).await,
        };
        let endpoint = path.map_or(Endpoint::Other, Path::endpoint);
        self.metrics.requests.get_or_create(&RequestLabel { endpoint, status: answer.status.as_u16() }).inc();
        self.metrics.request_seconds.observe(self.clock.now().saturating_duration_since(begun).as_secs_f64());
        answer.into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h004_core_paths_are_told_apart_and_may_end_in_a_slash() {
        assert_eq!(Path::parse("/gcm/send"), Some(Path::Send));
        assert_eq!(Path::parse("/fcm/send/"), Some(Path::Send));
        assert_eq!(Path::parse("/gcm/notification"), Some(Path::Notification));
        assert_eq!(Path::parse("/fcm/notification/"), Some(Path::Notification));
        assert_eq!(Path::parse("/c2dm/register"), Some(Path::Register));
        assert_eq!(Path::parse("/v1/projects/p-1/installations"), Some(Path::Installations { project: "p-1" }));
        for unknown in [
            "/",
            "/gcm",
            "/gcm/send/X",
            "/gcm/googlenotification",
            "/gcm/notification/x",
            "/gcm/send//",
            "/GCM/SEND",
            "/v1/projects//installations",
            "/v1/projects/a/b/installations",
        ] {
            assert_eq!(Path::parse(unknown), None, "{unknown}");
        }
    }
}
