//! Who may connect, and what the answer says. A value: the first frame comes in, a verdict goes out.
//!
//! Checked are user, resource and token, nothing else: domain, id, auth_service and settings may be anything (device.md section
//! 8.1).

use std::time::Duration;

use bytes::Bytes;
use martlet_proto::{
    device::mcs::{ErrorInfo, HeartbeatConfig, LoginRequest, LoginResponse, StreamErrorStanza},
    limits::{MCS_RECEIVED_IDS_MAX, MCS_VERSION, MCS_VERSION_MIN},
    mcs::{
        frame::{Frame, FrameError, Tag, encode_first, encode_login_response},
        stanza::Stanza,
    },
    message::MessageId,
    tag::{AndroidId, DeviceTag, SecurityToken},
};

use prometheus_client::encoding::EncodeLabelValue;

use super::{Credentials, Identity, session::Traits};

/// A device that may connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// The device.
    pub tag: DeviceTag,
    /// What it says about the session.
    pub traits: Traits,
    /// Messages it has and does not know to be acknowledged; ids that cannot be ours are left out.
    pub received: Vec<MessageId>,
    version: u8,
    id: String,
}

/// A connection that does not become a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// Why.
    pub reason: RejectReason,
    /// To write before the close, if anything.
    pub answer: Option<Bytes>,
}

/// Why a login was rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum RejectReason {
    /// A version below 38.
    Version,
    /// Not frames, or a frame above the cap.
    BadFrame,
    /// The first frame is no login, or a login without its required fields.
    NoLogin,
    /// Identity and token do not belong together.
    Credentials,
    /// No keys are known to check them with.
    NoKeys,
}

/// Judges a connection's first frame. `version` is what came before it.
///
/// # Errors
/// What to answer, and why.
pub fn judge(
    version: Option<u8>,
    frame: Result<&Frame, FrameError>,
    credentials: &dyn Credentials,
) -> Result<Login, Rejected> {
    let silent = |reason| Rejected { reason, answer: None };
    let version = answered_version(version.unwrap_or(MCS_VERSION));
    let frame = match frame {
        Ok(frame) => frame,
        Err(FrameError::Version(_)) => return Err(silent(RejectReason::Version)),
        Err(FrameError::Size | FrameError::TooLarge { .. }) => {
            let error = StreamErrorStanza { r#type: "bad-frame".into(), text: None };
            let answer = Some(encode_first(version, Tag::StreamError, &error));
            return Err(Rejected { reason: RejectReason::BadFrame, answer });
        }
    };
    let Ok(Stanza::LoginRequest(request)) = Stanza::decode(frame) else { return Err(silent(RejectReason::NoLogin)) };
    match identity(&request, credentials) {
        Identity::Device(tag) => {
            Ok(Login { tag, traits: traits(&request), received: received(&request), version, id: request.id })
        }
        Identity::Wrong => {
            Err(Rejected { reason: RejectReason::Credentials, answer: Some(refusal(version, request.id)) })
        }
        Identity::Unknown => Err(silent(RejectReason::NoKeys)),
    }
}

impl Login {
    /// Version byte and LoginResponse, to be written in one go. `heartbeat_interval`: what the device is told to ping at;
    /// zero tells it nothing.
    pub fn answer(&self, server_ms: u64, heartbeat_interval: Duration) -> Bytes {
        let interval_ms = i32::try_from(heartbeat_interval.as_millis()).unwrap_or(i32::MAX);
        let response = LoginResponse {
            id: self.id.clone(),
            // aracna refuses anything but 1: the login is the first frame.
            last_stream_id_received: Some(1),
            heartbeat_config: (interval_ms > 0)
                .then(|| HeartbeatConfig { interval_ms: Some(interval_ms), ..HeartbeatConfig::default() }),
            server_timestamp: Some(i64::try_from(server_ms).unwrap_or(i64::MAX)),
            ..LoginResponse::default()
        };
        encode_login_response(self.version, &response)
    }
}

/// 41 for all, but for a client that speaks 38 itself (device.md section 6).
fn answered_version(client: u8) -> u8 {
    if client == MCS_VERSION_MIN { MCS_VERSION_MIN } else { MCS_VERSION }
}

fn identity(request: &LoginRequest, credentials: &dyn Credentials) -> Identity {
    let (Ok(user), Ok(resource)) = (request.user.parse::<AndroidId>(), request.resource.parse::<AndroidId>()) else {
        return Identity::Wrong;
    };
    match request.auth_token.parse::<SecurityToken>() {
        Ok(token) if user == resource => credentials.authenticate(user, token),
        _ => Identity::Wrong,
    }
}

fn refusal(version: u8, id: String) -> Bytes {
    let error = ErrorInfo {
        code: 401,
        message: Some("Authentication failed".into()),
        r#type: Some("auth".into()),
        extension: None,
    };
    encode_login_response(version, &LoginResponse { id, error: Some(error), ..LoginResponse::default() })
}

fn traits(request: &LoginRequest) -> Traits {
    let setting = |name: &str| {
        let mut settings = request.setting.iter().filter(|setting| setting.name == name);
        settings.next().map(|setting| setting.value.as_str())
    };
    let stat_ms = request.heartbeat_stat.as_ref().and_then(|stat| u64::try_from(stat.interval_ms).ok());
    let hbping_ms = setting("hbping").and_then(|value| value.parse::<u64>().ok());
    let wished_ms = stat_ms.filter(|ms| *ms > 0).or(hbping_ms).filter(|ms| *ms > 0);
    Traits {
        wished_ping: wished_ms.map(Duration::from_millis),
        explicit_stream_ids: setting("rmq2v") == Some("1"),
        app_id_is_persistent: request.id.starts_with("android-"),
        acks_pending: false,
    }
}

fn received(request: &LoginRequest) -> Vec<MessageId> {
    let ids = request.received_persistent_id.iter().filter_map(|id| id.parse().ok());
    let mut ids: Vec<MessageId> = ids.collect();
    ids.sort_unstable();
    ids.dedup();
    ids.truncate(MCS_RECEIVED_IDS_MAX);
    ids
}

#[cfg(test)]
mod tests {
    use martlet_proto::device::mcs::{HeartbeatStat, Setting};
    use prost::Message as _;

    use super::*;

    /// Knows one pair.
    #[derive(Debug)]
    struct OnePair {
        keys: bool,
    }

    impl Credentials for OnePair {
        fn authenticate(&self, android_id: AndroidId, token: SecurityToken) -> Identity {
            match (self.keys, android_id.get(), token.get()) {
                (false, ..) => Identity::Unknown,
                (true, 4_234_066_615_089_043_076, 2_324_440_704_598_274_603) => Identity::Device(DeviceTag(7)),
                _ => Identity::Wrong,
            }
        }
    }

    fn request() -> LoginRequest {
        LoginRequest {
            id: "chrome-94.0.4606.51".into(),
            domain: "mcs.android.com".into(),
            user: "4234066615089043076".into(),
            resource: "4234066615089043076".into(),
            auth_token: "2324440704598274603".into(),
            ..LoginRequest::default()
        }
    }

    fn frame(request: &LoginRequest) -> Frame {
        Frame { tag: Tag::LoginRequest as u8, body: request.encode_to_vec().into() }
    }

    fn judged(version: u8, request: &LoginRequest) -> Result<Login, Rejected> {
        judge(Some(version), Ok(&frame(request)), &OnePair { keys: true })
    }

    fn response(bytes: &Bytes) -> (u8, LoginResponse) {
        let mut decoder = martlet_proto::mcs::frame::Decoder::of_server();
        let mut input = &bytes[..];
        let frame = decoder.decode(&mut input).unwrap().unwrap();
        assert!(input.is_empty());
        match Stanza::decode(&frame).unwrap() {
            Stanza::LoginResponse(response) => (decoder.version().unwrap(), *response),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn mc_04_core_the_answer_echoes_the_id_and_acknowledges_the_login_alone() {
        let login = judged(41, &request()).unwrap();
        let (version, response) = response(&login.answer(1_700_000_000_000, Duration::ZERO));
        assert_eq!(version, 41);
        assert_eq!(
            response,
            LoginResponse {
                id: "chrome-94.0.4606.51".into(),
                last_stream_id_received: Some(1),
                server_timestamp: Some(1_700_000_000_000),
                ..LoginResponse::default()
            }
        );
    }

    #[test]
    fn mc_02_core_only_a_client_of_38_is_answered_38() {
        for (client, answer) in [(38, 38), (39, 41), (40, 41), (41, 41), (42, 41), (255, 41)] {
            let login = judged(client, &request()).unwrap();
            assert_eq!(response(&login.answer(0, Duration::ZERO)).0, answer);
        }
    }

    #[test]
    fn mc_03_core_a_version_below_38_is_not_answered() {
        let rejected = judge(None, Err(FrameError::Version(37)), &OnePair { keys: true }).unwrap_err();
        assert_eq!(rejected, Rejected { reason: RejectReason::Version, answer: None });
    }

    #[test]
    fn mc_05_core_wrong_credentials_are_answered_401_with_the_bytes_of_the_notes() {
        let wrong = [
            LoginRequest { auth_token: "1".into(), ..request() },
            LoginRequest { auth_token: "x".into(), ..request() },
            LoginRequest { resource: "4234066615089043077".into(), ..request() },
            LoginRequest { user: "0".into(), resource: "0".into(), ..request() },
        ];
        for request in wrong {
            let rejected = judged(41, &request).unwrap_err();
            assert_eq!(rejected.reason, RejectReason::Credentials);
            // device.md section 10, "Refused login".
            let expected = "2903370a136368726f6d652d39342e302e343630362e35311a20089103121541757468656e7469636174696f6e206661696c65641a0461757468";
            let hex: String = rejected.answer.unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, expected);
        }
    }

    #[test]
    fn without_keys_a_login_is_neither_right_nor_wrong() {
        let rejected = judge(Some(41), Ok(&frame(&request())), &OnePair { keys: false }).unwrap_err();
        assert_eq!(rejected, Rejected { reason: RejectReason::NoKeys, answer: None });
    }

    #[test]
    fn mc_07_core_another_first_frame_is_not_answered() {
        for tag in [0, 3, 4, 7, 8, 15, 99] {
            let frame = Frame { tag, body: Bytes::new() };
            let rejected = judge(Some(41), Ok(&frame), &OnePair { keys: true }).unwrap_err();
            assert_eq!(rejected, Rejected { reason: RejectReason::NoLogin, answer: None });
        }
    }

    #[test]
    fn mc_09_core_a_login_above_the_cap_is_answered_with_a_stream_error() {
        let error = FrameError::TooLarge { size: 1 << 30, cap: 1 };
        let rejected = judge(Some(41), Err(error), &OnePair { keys: true }).unwrap_err();
        assert_eq!(rejected.reason, RejectReason::BadFrame);
        // Version, then the StreamErrorStanza of device.md section 10.
        assert_eq!(rejected.answer.unwrap(), &b"\x29\x0a\x0b\x0a\x09bad-frame"[..]);
    }

    #[test]
    fn mc_16_core_a_configured_heartbeat_interval_is_told() {
        let login = judged(41, &request()).unwrap();
        let (_, response) = response(&login.answer(0, Duration::from_secs(60)));
        assert_eq!(response.heartbeat_config.unwrap().interval_ms, Some(60_000));
    }

    #[test]
    fn mc_17_core_heartbeat_stat_and_hbping_are_wishes_for_pings() {
        let stat = |interval_ms| HeartbeatStat { ip: String::new(), timeout: true, interval_ms };
        let hbping = |value: &str| Setting { name: "hbping".into(), value: value.into() };
        let wish = |stat: Option<HeartbeatStat>, setting: Vec<Setting>| {
            let request = LoginRequest { heartbeat_stat: stat, setting, ..request() };
            judged(41, &request).unwrap().traits.wished_ping
        };
        assert_eq!(wish(Some(stat(10_000)), vec![]), Some(Duration::from_secs(10)));
        assert_eq!(wish(None, vec![hbping("30000")]), Some(Duration::from_secs(30)));
        assert_eq!(wish(Some(stat(-1)), vec![hbping("-5")]), None);
        assert_eq!(wish(Some(stat(0)), vec![hbping("often")]), None);
    }

    #[test]
    fn dl_07_core_ids_that_cannot_be_ours_are_left_out_and_repeats_count_once() {
        let ours = "0:1700000000000001%00000000000000a1";
        let received = vec![ours.into(), "u-1".into(), String::new(), ours.into()];
        let login = judged(41, &LoginRequest { received_persistent_id: received, ..request() }).unwrap();
        assert_eq!(login.received, [ours.parse().unwrap()]);
    }
}
