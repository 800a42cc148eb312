//! Frames: `tag (1 byte) | size (varint, 1 to 5 bytes) | body`, and the version byte before a side's first. Source: device.md
//! section 6.
//!
//! [`Decoder`] reads either side's bytes, however they are cut. It takes from its input only what the frame at hand needs, checks
//! the size against its cap before it keeps a byte of the body, and grows with what has arrived, not with what was announced.
//! Between frames it holds no buffer: an idle connection costs nothing here.

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;

use crate::{
    device::mcs::LoginResponse,
    limits::{MCS_FRAME_MAX_BYTES, MCS_LOGIN_MAX_BYTES, MCS_SERVER_FRAME_MAX_BYTES, MCS_VERSION_MIN},
};

/// What a frame holds. Source: device.md section 6.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Tag {
    /// Either side.
    HeartbeatPing = 0,
    /// Either side.
    HeartbeatAck = 1,
    /// Client, once, first.
    LoginRequest = 2,
    /// Server, once, first.
    LoginResponse = 3,
    /// The end of the connection.
    Close = 4,
    /// Acknowledgements.
    Iq = 7,
    /// Messages.
    Data = 8,
    /// Server, before it closes.
    StreamError = 10,
}

impl Tag {
    /// The tag of a number; `None` for obsolete (5, 6, 9, 11 to 15) and unknown ones, which are skipped and counted.
    pub fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::HeartbeatPing,
            1 => Self::HeartbeatAck,
            2 => Self::LoginRequest,
            3 => Self::LoginResponse,
            4 => Self::Close,
            7 => Self::Iq,
            8 => Self::Data,
            10 => Self::StreamError,
            _ => return None,
        })
    }
}

/// One frame. Counts as one in its side's stream ids, whatever the tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// As sent; see [`Tag::from_number`].
    pub tag: u8,
    /// The stanza, not yet decoded.
    pub body: Bytes,
}

/// Why bytes are no frames. The connection cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The version is older than any that is served.
    #[error("MCS version {0}")]
    Version(u8),
    /// A size varint of more than 5 bytes, or beyond 32 bits.
    #[error("malformed frame size")]
    Size,
    /// The announced size is above the cap.
    #[error("frame of {size} bytes, at most {cap} are taken")]
    TooLarge {
        /// Announced.
        size: usize,
        /// Allowed at this moment.
        cap: usize,
    },
}

/// Reads one side's frames.
#[derive(Debug)]
pub struct Decoder {
    cap: usize,
    version: Option<u8>,
    state: State,
}

#[derive(Debug)]
enum State {
    Version,
    Tag,
    Size { tag: u8, size: u64, shift: u32 },
    Body { tag: u8, left: usize, body: BytesMut },
    Failed(FrameError),
}

impl Decoder {
    /// Reads what a client sends: the cap is that before login, until [`Decoder::logged_in`].
    pub fn of_client() -> Self {
        Self { cap: MCS_LOGIN_MAX_BYTES, version: None, state: State::Version }
    }

    /// Reads what a server sends.
    pub fn of_server() -> Self {
        Self { cap: MCS_SERVER_FRAME_MAX_BYTES, version: None, state: State::Version }
    }

    /// The client's login was accepted: from the next frame on its frames are smaller.
    pub fn logged_in(&mut self) {
        self.cap = MCS_FRAME_MAX_BYTES;
    }

    /// The version byte, once it has come.
    pub fn version(&self) -> Option<u8> {
        self.version
    }

    /// Whether a frame (or the version byte) has begun and not ended: the moment to watch for a stall.
    pub fn is_inside_frame(&self) -> bool {
        matches!(self.state, State::Size { .. } | State::Body { .. })
    }

    /// The next frame; `None` when the input is used up. Takes from the input's front what it needs and no more.
    ///
    /// After an error every call gives that error.
    pub fn decode(&mut self, input: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
        loop {
            match &mut self.state {
                State::Failed(error) => return Err(*error),
                State::Body { tag, left, body } => {
                    let (taken, rest) = input.split_at(input.len().min(*left));
                    body.extend_from_slice(taken);
                    *left -= taken.len();
                    *input = rest;
                    if *left > 0 {
                        return Ok(None);
                    }
                    let frame = Frame { tag: *tag, body: std::mem::take(body).freeze() };
                    self.state = State::Tag;
                    return Ok(Some(frame));
                }
                State::Version | State::Tag | State::Size { .. } => {
                    let Some((&byte, rest)) = input.split_first() else { return Ok(None) };
                    *input = rest;
                    if let Err(error) = self.header(byte) {
                        self.state = State::Failed(error);
                    }
                }
            }
        }
    }

    fn header(&mut self, byte: u8) -> Result<(), FrameError> {
        match &mut self.state {
            State::Version => {
                if byte < MCS_VERSION_MIN {
                    return Err(FrameError::Version(byte));
                }
                self.version = Some(byte);
                self.state = State::Tag;
            }
            State::Tag => self.state = State::Size { tag: byte, size: 0, shift: 0 },
            State::Size { tag, size, shift } => {
                *size |= u64::from(byte & 0x7f) << *shift;
                *shift += 7;
                if byte & 0x80 != 0 {
                    return if *shift < 35 { Ok(()) } else { Err(FrameError::Size) };
                }
                let size = u32::try_from(*size).map_err(|_| FrameError::Size)? as usize;
                if size > self.cap {
                    return Err(FrameError::TooLarge { size, cap: self.cap });
                }
                self.state = State::Body { tag: *tag, left: size, body: BytesMut::new() };
            }
            State::Body { .. } | State::Failed(_) => unreachable!("decode keeps these to itself"),
        }
        Ok(())
    }
}

/// One frame, to be written by itself: some clients lose the second of two in one chunk (device.md section 6).
pub fn encode(tag: Tag, body: &impl Message) -> Bytes {
    let mut bytes = BytesMut::with_capacity(6 + body.encoded_len());
    put(&mut bytes, tag, body);
    bytes.freeze()
}

/// A side's first frame, with the version byte before it.
pub fn encode_first(version: u8, tag: Tag, body: &impl Message) -> Bytes {
    let mut bytes = BytesMut::with_capacity(7 + body.encoded_len());
    bytes.put_u8(version);
    put(&mut bytes, tag, body);
    bytes.freeze()
}

/// The server's first bytes: version and login response in one.
pub fn encode_login_response(version: u8, response: &LoginResponse) -> Bytes {
    encode_first(version, Tag::LoginResponse, response)
}

fn put(bytes: &mut BytesMut, tag: Tag, body: &impl Message) {
    bytes.put_u8(tag as u8);
    body.encode_length_delimited(bytes).expect("a BytesMut grows");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames(decoder: &mut Decoder, mut input: &[u8]) -> Result<Vec<Frame>, FrameError> {
        let mut frames = Vec::new();
        while let Some(frame) = decoder.decode(&mut input)? {
            frames.push(frame);
        }
        assert!(input.is_empty());
        Ok(frames)
    }

    fn frame(tag: u8, body: &[u8]) -> Frame {
        Frame { tag, body: Bytes::copy_from_slice(body) }
    }

    #[test]
    fn mc_08_core_a_stream_cut_into_bytes_gives_the_same_frames() {
        let mut decoder = Decoder::of_client();
        let mut got = Vec::new();
        for byte in [41, 2, 3, 1, 2, 3, 0, 0, 7, 1, 9] {
            got.extend(frames(&mut decoder, &[byte]).unwrap());
        }
        assert_eq!(got, [frame(2, &[1, 2, 3]), frame(0, &[]), frame(7, &[9])]);
        assert_eq!(decoder.version(), Some(41));
        assert!(!decoder.is_inside_frame());
    }

    #[test]
    fn mc_03_core_a_client_older_than_38_is_refused() {
        assert_eq!(frames(&mut Decoder::of_client(), &[37, 0, 0]), Err(FrameError::Version(37)));
        assert!(frames(&mut Decoder::of_client(), &[38, 0, 0]).is_ok());
    }

    #[test]
    fn mc_09_core_sizes_of_two_to_five_bytes_are_understood() {
        for size in [&[3][..], &[0x83, 0], &[0x83, 0x80, 0], &[0x83, 0x80, 0x80, 0], &[0x83, 0x80, 0x80, 0x80, 0]] {
            let input = [&[41, 2], size, &[1, 2, 3]].concat();
            assert_eq!(frames(&mut Decoder::of_client(), &input).unwrap(), [frame(2, &[1, 2, 3])]);
        }
        let long = [41, 2, 0x83, 0x80, 0x80, 0x80, 0x80, 0];
        assert_eq!(frames(&mut Decoder::of_client(), &long), Err(FrameError::Size));
        let wide = [41, 2, 0xff, 0xff, 0xff, 0xff, 0x7f];
        assert_eq!(frames(&mut Decoder::of_client(), &wide), Err(FrameError::Size));
    }

    #[test]
    fn mc_09_core_a_frame_above_the_cap_is_refused_before_its_body_comes() {
        let header = |size: usize| {
            let mut bytes = vec![41, 2];
            prost::encoding::encode_varint(size as u64, &mut bytes);
            bytes
        };
        let mut decoder = Decoder::of_client();
        assert_eq!(frames(&mut decoder, &header(MCS_LOGIN_MAX_BYTES)), Ok(vec![]));
        assert!(decoder.is_inside_frame());
        let error = FrameError::TooLarge { size: MCS_LOGIN_MAX_BYTES + 1, cap: MCS_LOGIN_MAX_BYTES };
        let mut decoder = Decoder::of_client();
        assert_eq!(frames(&mut decoder, &header(MCS_LOGIN_MAX_BYTES + 1)), Err(error));
        assert_eq!(decoder.decode(&mut &[0, 0][..]), Err(error), "and every call after it");
        let mut decoder = Decoder::of_client();
        decoder.logged_in();
        let error = FrameError::TooLarge { size: MCS_FRAME_MAX_BYTES + 1, cap: MCS_FRAME_MAX_BYTES };
        assert_eq!(frames(&mut decoder, &header(MCS_FRAME_MAX_BYTES + 1)), Err(error));
    }

    #[test]
    fn an_announced_body_takes_no_memory_before_it_comes() {
        let mut decoder = Decoder::of_client();
        assert_eq!(frames(&mut decoder, &[41, 2, 0x80, 0x80, 2, 1]), Ok(vec![]));
        let State::Body { body, .. } = &decoder.state else { panic!("{decoder:?}") };
        assert!(body.capacity() < 1024, "{}", body.capacity());
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_the_same_however_they_are_cut(bytes: Vec<u8>, cuts: Vec<proptest::sample::Index>) {
            let whole = frames(&mut Decoder::of_client(), &bytes);
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.sort_unstable();
            cuts.push(bytes.len());
            let (mut decoder, mut from, mut parts) = (Decoder::of_client(), 0, Ok(Vec::new()));
            for to in cuts {
                match frames(&mut decoder, &bytes[from..to]) {
                    Ok(more) => parts.as_mut().unwrap().extend(more),
                    Err(error) => { parts = Err(error); break }
                }
                from = to;
            }
            prop_assert_eq!(whole, parts);
        }
    }
}
