//! Stanzas: what a frame holds, typed, with the required fields that prost would silently fill tested for emptiness.
//!
//! Acknowledgements by IQ are read and made here ([`Ack`]); what they remove is the session's and the node's business.

use bytes::Bytes;
use prost::Message;

use super::frame::{self, Frame, Tag};
use crate::device::mcs::{
    Close, DataMessageStanza, Extension, HeartbeatAck, HeartbeatPing, IqStanza, LoginRequest, LoginResponse,
    SelectiveAck, StreamAck, StreamErrorStanza, iq_stanza::IqType,
};

const SELECTIVE_ACK: i32 = 12;
const STREAM_ACK: i32 = 13;

/// One frame, read.
#[derive(Debug, Clone, PartialEq)]
pub enum Stanza {
    /// Asks for a sign of life.
    HeartbeatPing(HeartbeatPing),
    /// Gives it.
    HeartbeatAck(HeartbeatAck),
    /// A client presents itself.
    LoginRequest(Box<LoginRequest>),
    /// The server's answer to it.
    LoginResponse(Box<LoginResponse>),
    /// The end of the connection.
    Close,
    /// Acknowledgements; see [`ack_of`].
    Iq(Box<IqStanza>),
    /// A message.
    Data(Box<DataMessageStanza>),
    /// The server's word before it closes.
    StreamError(StreamErrorStanza),
    /// A tag nobody uses any more, or none we know: skipped, and counted in the stream ids.
    Obsolete(u8),
}

/// Why a frame's body is no stanza.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StanzaError {
    /// Not the protocol buffer its tag announces.
    #[error("malformed body of tag {0}")]
    Malformed(u8),
    /// A required field is absent or empty.
    #[error("tag {tag} without {field}")]
    Missing {
        /// The frame's tag.
        tag: u8,
        /// Name of the field.
        field: &'static str,
    },
}

impl Stanza {
    /// Reads a frame.
    pub fn decode(frame: &Frame) -> Result<Self, StanzaError> {
        decode(frame.tag, frame.body.clone())
    }

    /// The frame's bytes; an obsolete tag has none.
    pub fn encode(&self) -> Option<Bytes> {
        Some(match self {
            Self::HeartbeatPing(body) => frame::encode(Tag::HeartbeatPing, body),
            Self::HeartbeatAck(body) => frame::encode(Tag::HeartbeatAck, body),
            Self::LoginRequest(body) => frame::encode(Tag::LoginRequest, &**body),
            Self::LoginResponse(body) => frame::encode(Tag::LoginResponse, &**body),
            Self::Close => frame::encode(Tag::Close, &Close {}),
            Self::Iq(body) => frame::encode(Tag::Iq, &**body),
            Self::Data(body) => frame::encode(Tag::Data, &**body),
            Self::StreamError(body) => frame::encode(Tag::StreamError, body),
            Self::Obsolete(_) => return None,
        })
    }

    /// The cumulative acknowledgement it carries: all frames of the other side up to this number. `None` is nothing new;
    /// numbers below 1 are, too (clients write 0, and hostile ones negatives). It may exceed what was sent: ignore it then.
    pub fn acknowledged_through(&self) -> Option<u32> {
        let number = match self {
            Self::HeartbeatPing(body) => body.last_stream_id_received,
            Self::HeartbeatAck(body) => body.last_stream_id_received,
            Self::LoginResponse(body) => body.last_stream_id_received,
            Self::Iq(body) => body.last_stream_id_received,
            Self::Data(body) => body.last_stream_id_received,
            Self::LoginRequest(_) | Self::Close | Self::StreamError(_) | Self::Obsolete(_) => None,
        };
        number.and_then(|number| u32::try_from(number).ok()).filter(|&number| number > 0)
    }
}

/// Reads the body of a frame.
pub fn decode(tag: u8, body: Bytes) -> Result<Stanza, StanzaError> {
    let Some(known) = Tag::from_number(tag) else { return Ok(Stanza::Obsolete(tag)) };
    Ok(match known {
        Tag::HeartbeatPing => Stanza::HeartbeatPing(read(tag, body)?),
        Tag::HeartbeatAck => Stanza::HeartbeatAck(read(tag, body)?),
        Tag::LoginRequest => {
            let login: LoginRequest = read(tag, body)?;
            // Not id or domain, which may be empty or anything.
            present(tag, "user", &login.user)?;
            present(tag, "resource", &login.resource)?;
            present(tag, "auth_token", &login.auth_token)?;
            Stanza::LoginRequest(Box::new(login))
        }
        Tag::LoginResponse => Stanza::LoginResponse(Box::new(read(tag, body)?)),
        Tag::Close => {
            read::<Close>(tag, body)?;
            Stanza::Close
        }
        Tag::Iq => Stanza::Iq(Box::new(read(tag, body)?)),
        Tag::Data => {
            let data: DataMessageStanza = read(tag, body)?;
            present(tag, "from", &data.from)?;
            present(tag, "category", &data.category)?;
            for pair in &data.app_data {
                present(tag, "app_data.key", &pair.key)?;
            }
            Stanza::Data(Box::new(data))
        }
        Tag::StreamError => Stanza::StreamError(read(tag, body)?),
    })
}

fn read<M: Message + Default>(tag: u8, body: Bytes) -> Result<M, StanzaError> {
    M::decode(body).map_err(|_| StanzaError::Malformed(tag))
}

fn present(tag: u8, field: &'static str, value: &str) -> Result<(), StanzaError> {
    if value.is_empty() { Err(StanzaError::Missing { tag, field }) } else { Ok(()) }
}

/// What an IQ stanza acknowledges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ack {
    /// These persistent ids, and nothing else.
    Selective(Vec<String>),
    /// What its `last_stream_id_received` says.
    Stream,
    /// Nothing: another extension, or none.
    None,
}

/// Reads an IQ stanza's extension.
pub fn ack_of(iq: &IqStanza) -> Result<Ack, StanzaError> {
    match &iq.extension {
        Some(extension) if extension.id == SELECTIVE_ACK => {
            let ack: SelectiveAck = read(Tag::Iq as u8, extension.data.clone())?;
            Ok(Ack::Selective(ack.id))
        }
        Some(extension) if extension.id == STREAM_ACK => Ok(Ack::Stream),
        _ => Ok(Ack::None),
    }
}

/// An IQ stanza that acknowledges exactly these persistent ids.
pub fn selective_ack(ids: Vec<String>, last_stream_id_received: Option<i32>) -> IqStanza {
    iq(SELECTIVE_ACK, SelectiveAck { id: ids }.encode_to_vec().into(), last_stream_id_received)
}

/// An IQ stanza that acknowledges all frames up to a number.
pub fn stream_ack(last_stream_id_received: i32) -> IqStanza {
    iq(STREAM_ACK, StreamAck {}.encode_to_vec().into(), Some(last_stream_id_received))
}

fn iq(extension: i32, data: Bytes, last_stream_id_received: Option<i32>) -> IqStanza {
    IqStanza {
        r#type: IqType::Set as i32,
        extension: Some(Extension { id: extension, data }),
        last_stream_id_received,
        ..IqStanza::default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn login() -> LoginRequest {
        LoginRequest { user: "1".into(), resource: "1".into(), auth_token: "2".into(), ..LoginRequest::default() }
    }

    fn read_back(tag: Tag, body: &impl Message) -> Result<Stanza, StanzaError> {
        decode(tag as u8, body.encode_to_vec().into())
    }

    #[test]
    fn mc_06_core_a_login_needs_user_resource_and_token_alone() {
        assert_eq!(read_back(Tag::LoginRequest, &login()), Ok(Stanza::LoginRequest(Box::new(login()))));
        for (field, login) in [
            ("user", LoginRequest { user: String::new(), ..login() }),
            ("resource", LoginRequest { resource: String::new(), ..login() }),
            ("auth_token", LoginRequest { auth_token: String::new(), ..login() }),
        ] {
            assert_eq!(read_back(Tag::LoginRequest, &login), Err(StanzaError::Missing { tag: 2, field }));
        }
    }

    #[test]
    fn mc_12_core_obsolete_tags_are_skipped_whatever_they_hold() {
        for tag in [5, 6, 9, 11, 12, 13, 14, 15, 16, 255] {
            assert_eq!(decode(tag, Bytes::from_static(b"\xff\xff")), Ok(Stanza::Obsolete(tag)));
        }
    }

    #[test]
    fn mc_13_core_no_obsolete_tag_can_be_written() {
        assert_eq!(Stanza::Obsolete(5).encode(), None);
        for number in [5, 6, 9, 11, 12, 13, 14, 15] {
            assert_eq!(Tag::from_number(number), None);
        }
    }

    #[test]
    fn a_message_without_sender_application_or_key_is_refused() {
        let data = DataMessageStanza { from: "1".into(), category: "a".into(), ..Default::default() };
        assert!(read_back(Tag::Data, &data).is_ok());
        for stanza in [
            DataMessageStanza { from: String::new(), ..data.clone() },
            DataMessageStanza { category: String::new(), ..data.clone() },
            DataMessageStanza { app_data: vec![Default::default()], ..data.clone() },
        ] {
            assert!(matches!(read_back(Tag::Data, &stanza), Err(StanzaError::Missing { tag: 8, .. })));
        }
    }

    #[test]
    fn acknowledgements_of_nothing_new_are_none() {
        for (number, through) in [(None, None), (Some(0), None), (Some(-1), None), (Some(3), Some(3))] {
            let ping = HeartbeatPing { last_stream_id_received: number, ..Default::default() };
            assert_eq!(Stanza::HeartbeatPing(ping).acknowledged_through(), through);
        }
    }

    #[test]
    fn acks_are_read_back() {
        let ids = vec!["a".to_owned(), String::new()];
        assert_eq!(ack_of(&selective_ack(ids.clone(), None)), Ok(Ack::Selective(ids)));
        assert_eq!(ack_of(&stream_ack(4)), Ok(Ack::Stream));
        assert_eq!(ack_of(&IqStanza::default()), Ok(Ack::None));
        assert_eq!(ack_of(&iq(SELECTIVE_ACK, Bytes::from_static(b"\xff"), None)), Err(StanzaError::Malformed(7)));
    }

    proptest! {
        #[test]
        fn any_body_is_answered(tag: u8, body: Vec<u8>) {
            if let Ok(Stanza::Iq(iq)) = decode(tag, body.into()) {
                let _ = ack_of(&iq);
            }
        }
    }
}
