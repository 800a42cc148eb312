//! Bytes that nobody honest sends: each is answered, none ends the process, and what was sealed stays shut.

use martlet_proto::{
    cluster::{
        meta::{KeyPurpose, SealedKey},
        queue::Message,
    },
    limits::{MCS_FRAME_MAX_BYTES, MCS_LOGIN_MAX_BYTES, MCS_SERVER_FRAME_MAX_BYTES},
    mcs::{
        downstream,
        frame::{Decoder, FrameError},
        stanza::{Ack, Stanza, ack_of},
    },
    seal::{ClusterSecret, SealError},
    token::{RegistrationToken, TokenError, TokenKey},
};
use proptest::{prelude::*, sample::Index};
use rand::{SeedableRng, rngs::StdRng};

use crate::captures;

/// Reads a stream as a session does, up to its first fault; how many stanzas came before it.
fn stanzas(mut decoder: Decoder, bytes: &[u8]) -> usize {
    let (mut input, mut count) = (bytes, 0);
    while let Ok(Some(frame)) = decoder.decode(&mut input) {
        let Ok(stanza) = Stanza::decode(&frame) else { break };
        assert_ne!(stanza.acknowledged_through(), Some(0));
        if let Stanza::Iq(iq) = &stanza {
            let _: Result<Ack, _> = ack_of(iq);
        }
        count += 1;
    }
    count
}

#[test]
fn a_stream_that_breaks_off_anywhere_is_read_up_to_there() {
    for (_, bytes) in captures::streams() {
        let counts: Vec<_> = (0..=bytes.len()).map(|len| stanzas(Decoder::of_server(), &bytes[..len])).collect();
        assert!(counts.is_sorted());
        assert_eq!((counts[0], counts[bytes.len()]), (0, 7));
    }
}

#[test]
fn a_stream_with_any_bit_flipped_is_answered() {
    for (_, bytes) in captures::streams() {
        for at in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[at / 8] ^= 1 << (at % 8);
            stanzas(Decoder::of_client(), &flipped);
            stanzas(Decoder::of_server(), &flipped);
        }
    }
}

#[test]
fn the_greatest_size_is_refused_by_each_cap_and_the_cap_itself_is_not() {
    let mut after_login = Decoder::of_client();
    after_login.logged_in();
    for (mut decoder, cap) in [
        (Decoder::of_client(), MCS_LOGIN_MAX_BYTES),
        (after_login, MCS_FRAME_MAX_BYTES),
        (Decoder::of_server(), MCS_SERVER_FRAME_MAX_BYTES),
    ] {
        let mut bytes = vec![41, 8];
        prost::encoding::encode_varint(cap as u64, &mut bytes);
        bytes.resize(bytes.len() + cap, 0);
        let frame = decoder.decode(&mut &bytes[..]).unwrap().unwrap();
        assert_eq!((frame.tag, frame.body.len()), (8, cap));
        let error = FrameError::TooLarge { size: u32::MAX as usize, cap };
        assert_eq!(decoder.decode(&mut &[8, 0xff, 0xff, 0xff, 0xff, 0x0f][..]), Err(error));
    }
}

#[test]
fn a_sealed_key_with_any_bit_flipped_stays_shut() {
    let mut rng = StdRng::seed_from_u64(3);
    let secret = ClusterSecret::draw(&mut rng);
    let sealed = secret.seal(b"cluster", KeyPurpose::Token, 3, &[7; 32], &mut rng);
    let key = SealedKey { purpose: KeyPurpose::Token.into(), key_id: 3, sealed, ..SealedKey::default() };
    for at in 0..key.sealed.len() * 8 {
        let mut flipped = key.sealed.to_vec();
        flipped[at / 8] ^= 1 << (at % 8);
        let flipped = SealedKey { sealed: flipped.into(), ..key.clone() };
        assert_eq!(secret.unseal(b"cluster", &flipped), Err(SealError::DoesNotOpen), "bit {at}");
    }
    assert_eq!(secret.unseal(b"cluster", &key), Ok([7; 32]));
}

proptest! {
    #[test]
    fn any_bytes_after_the_version_are_answered(bytes: Vec<u8>) {
        let bytes = [&[41][..], &bytes].concat();
        stanzas(Decoder::of_client(), &bytes);
        stanzas(Decoder::of_server(), &bytes);
    }

    #[test]
    fn a_stream_with_a_piece_replaced_is_answered(from: Index, to: Index, piece: Vec<u8>) {
        for (decoder, mut bytes) in captures::streams() {
            let (from, to) = (from.index(bytes.len() + 1), to.index(bytes.len() + 1));
            bytes.splice(from.min(to)..from.max(to), piece.clone());
            stanzas(decoder, &bytes);
        }
    }

    #[test]
    fn any_row_of_a_mailbox_is_shown_or_refused(
        message_id: Vec<u8>, payload: Vec<u8>, ttl_secs: u32, accepted_ms: u64, total_deleted: u64, received: Option<i32>,
    ) {
        let is_whole = message_id.len() == 16;
        let message = Message {
            message_id: message_id.into(), payload: payload.into(), ttl_secs, accepted_ms, total_deleted,
            ..Message::default()
        };
        let shown = downstream::stanza(&message, received);
        prop_assert!(is_whole || shown.is_err());
        if let Ok(stanza) = shown {
            prop_assert!(stanza.ttl >= Some(0) && stanza.sent >= Some(0));
        }
    }

    #[test]
    fn a_text_with_the_shape_of_a_token_is_none_without_its_key(
        text in "[A-Za-z0-9_-]{22}:APA91bAQ[A-Za-z0-9_-]{36}(A{10}|[A-Za-z0-9_-]{10})[A-Za-z0-9_-]{85}[AQgw]",
    ) {
        if let Ok(token) = RegistrationToken::parse(&text) {
            let key = TokenKey::new(token.key_id(), [5; 32]);
            prop_assert_eq!(token.verify(&key), Err(TokenError::Mac));
        }
    }

    #[test]
    fn any_bytes_are_no_sealed_key(sealed: Vec<u8>, purpose: i32, key_id: u32) {
        let key = SealedKey { purpose, key_id, sealed: sealed.into(), ..SealedKey::default() };
        prop_assert_eq!(ClusterSecret::new([1; 32]).unseal(b"cluster", &key), Err(SealError::DoesNotOpen));
    }
}
