//! What holds for every value: of tokens, that a registration has one spelling; of frames, that cuts in the stream mean nothing.

use martlet_proto::{
    group::NotificationKey,
    mcs::{
        frame::{Decoder, Frame, FrameError},
        stanza::Stanza,
    },
    tag::DeviceTag,
    token::{Iid, RegistrationId, RegistrationToken, TokenError, TokenKey},
};
use proptest::{prelude::*, sample::Index};

use crate::{
    captures,
    frozen::{number, secret, text, vectors},
};

fn accepted(text: &str, key: &TokenKey) -> Result<RegistrationToken, TokenError> {
    RegistrationToken::parse(text)?.verify(key)
}

#[test]
fn every_token_with_one_character_changed_is_refused() {
    for vector in vectors("token.json") {
        let (key, token) = (TokenKey::new(number(&vector, "key_id"), secret(&vector)), text(&vector, "token"));
        for at in 0..token.len() {
            for other in (0..128).map(char::from).filter(|other| &token[at..=at] != other.encode_utf8(&mut [0; 4])) {
                let changed = format!("{}{other}{}", &token[..at], &token[at + 1..]);
                assert!(accepted(&changed, &key).is_err(), "{changed:?}");
            }
        }
        assert!(accepted(token, &key).is_ok());
    }
}

#[test]
fn every_notification_key_with_one_character_changed_lost_or_doubled_is_refused() {
    for vector in vectors("notification_key.json") {
        let key = TokenKey::new(number(&vector, "key_id"), secret(&vector));
        let accepted = |text: &str| NotificationKey::parse(text).and_then(|read| read.verify(&key));
        let whole = text(&vector, "notification_key");
        for at in 0..whole.len() {
            let (before, here, after) = (&whole[..at], &whole[at..=at], &whole[at + 1..]);
            for changed in [format!("{before}{after}"), format!("{before}{here}{here}{after}")] {
                assert!(accepted(&changed).is_err(), "{changed}");
            }
            for other in (0..128).map(char::from).filter(|other| here != other.encode_utf8(&mut [0; 4])) {
                assert!(accepted(&format!("{before}{other}{after}")).is_err(), "{other:?} at {at}");
            }
        }
        assert!(accepted(whole).is_ok());
    }
}

#[test]
fn every_token_with_a_character_lost_doubled_or_moved_is_refused() {
    for vector in vectors("token.json") {
        let (key, token) = (TokenKey::new(number(&vector, "key_id"), secret(&vector)), text(&vector, "token"));
        for at in 0..token.len() {
            let (before, here, after) = (&token[..at], &token[at..=at], &token[at + 1..]);
            let moved = format!("{before}{}{here}{}", after.get(..1).unwrap_or(""), after.get(1..).unwrap_or(""));
            for changed in [format!("{before}{after}"), format!("{before}{here}{here}{after}"), moved] {
                // Two equal neighbours change places without a trace.
                assert!(changed == token || accepted(&changed, &key).is_err(), "{changed}");
            }
        }
    }
}

proptest! {
    #[test]
    fn only_the_text_that_was_minted_is_the_token(
        key_id: u32, key: [u8; 32], tag: u64, id: [u8; 16], iid in "[A-Za-z0-9_-]{11}|[A-Za-z0-9_-]{22}", other: [u8; 16],
    ) {
        prop_assume!(id != other && !iid.contains("Error"));
        let (key, iid) = (TokenKey::new(key_id, key), Iid::parse(&iid).unwrap());
        let mint = |id| RegistrationToken::mint(&key, &iid, DeviceTag(tag), RegistrationId(id));
        let (Ok(token), Ok(other)) = (mint(id), mint(other)) else { return Ok(()) };
        prop_assert_eq!(accepted(token.as_str(), &key), Ok(token.clone()));
        // What stands for one registration (`:APA91b`, version, key, tag, id) does not pass with the MAC of another.
        let mac = token.as_str().len() - 86;
        let spliced = format!("{}{}", &token.as_str()[..mac], &other.as_str()[mac..]);
        prop_assert!(accepted(&spliced, &key).is_err());
    }

    #[test]
    fn the_streams_of_real_clients_give_the_same_frames_however_they_are_cut(cuts: Vec<Index>) {
        for ((whole, bytes), (cut, _)) in captures::streams().into_iter().zip(captures::streams()) {
            let whole = read(whole, [&bytes[..]]);
            prop_assert!(whole.as_ref().is_ok_and(|frames| frames.len() == 7), "{:?}", whole);
            prop_assert_eq!(read(cut, pieces(&bytes, &cuts)), whole);
        }
    }

    #[test]
    fn frames_are_what_was_framed_however_they_are_cut(
        frames in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..300), 0usize..3), 0..8),
        cuts: Vec<Index>,
        logged_in: bool,
    ) {
        let mut bytes = vec![41];
        for (tag, body, spare) in &frames {
            bytes.push(*tag);
            bytes.extend(size(body.len(), *spare));
            bytes.extend(body);
        }
        let mut decoder = Decoder::of_client();
        if logged_in {
            decoder.logged_in();
        }
        let frames: Vec<_> = frames.into_iter().map(|(tag, body, _)| Frame { tag, body: body.into() }).collect();
        prop_assert_eq!(read(decoder, pieces(&bytes, &cuts)), Ok(frames.clone()));
        prop_assert_eq!(read(Decoder::of_server(), pieces(&bytes, &cuts)), Ok(frames));
    }

    #[test]
    fn a_stanza_is_read_from_the_bytes_it_is_written_as(tag: u8, body: Vec<u8>) {
        if let Ok(stanza) = Stanza::decode(&Frame { tag, body: body.into() })
            && let Some(written) = stanza.encode()
        {
            let frames = read(Decoder::of_server(), [&[41][..], &written]).unwrap();
            prop_assert_eq!(frames.len(), 1);
            // As bytes: a float that is no number is unequal to itself.
            prop_assert_eq!(Stanza::decode(&frames[0]).unwrap().encode().unwrap(), written);
        }
    }
}

/// Every frame in the pieces, or the error that ends them.
fn read<'a>(mut decoder: Decoder, pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Frame>, FrameError> {
    let mut frames = Vec::new();
    for mut piece in pieces {
        while let Some(frame) = decoder.decode(&mut piece)? {
            frames.push(frame);
        }
        assert!(piece.is_empty(), "what is not taken would be lost");
    }
    Ok(frames)
}

fn pieces<'a>(bytes: &'a [u8], cuts: &[Index]) -> Vec<&'a [u8]> {
    let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    cuts.sort_unstable();
    cuts.push(bytes.len());
    let starts = std::iter::once(0).chain(cuts.iter().copied());
    starts.zip(&cuts).map(|(from, &to)| &bytes[from..to]).collect()
}

/// A size as a varint, longer than it must be by so many bytes: clients write such.
fn size(size: usize, spare: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::encode_varint(size as u64, &mut bytes);
    for _ in 0..spare {
        *bytes.last_mut().unwrap() |= 0x80;
        bytes.push(0);
    }
    bytes
}
