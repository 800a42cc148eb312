use std::io::{Read as _, Write as _};

use rustls::{
    ClientConfig, ClientConnection, ProtocolVersion, RootCertStore, SupportedProtocolVersion,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    version::{TLS12, TLS13},
};

use super::*;

/// A client of rustls's own and our server, joined by values.
struct Pair {
    client: ClientConnection,
    server: Tls,
    /// Bytes of the client that the server gets at once.
    chunk: usize,
}

impl Pair {
    fn new(version: &'static SupportedProtocolVersion, chunk: usize) -> Self {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(made.cert.der().clone()).unwrap();
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let client = ClientConnection::new(Arc::new(client), "localhost".try_into().unwrap()).unwrap();
        Self { client, server: Tls::new(Arc::new(server)).unwrap(), chunk }
    }

    /// Until neither side has anything to say.
    fn settle(&mut self) {
        loop {
            let mut bytes = Vec::new();
            while self.client.wants_write() {
                self.client.write_tls(&mut bytes).unwrap();
            }
            let answers = self.server.outgoing.split();
            if bytes.is_empty() && answers.is_empty() {
                return;
            }
            for chunk in bytes.chunks_mut(self.chunk) {
                self.server.receive(chunk).unwrap();
            }
            let mut answers = &answers[..];
            while !answers.is_empty() {
                self.client.read_tls(&mut answers).unwrap();
                self.client.process_new_packets().unwrap();
            }
        }
    }

    fn shaken(version: &'static SupportedProtocolVersion, chunk: usize) -> Self {
        let mut pair = Self::new(version, chunk);
        pair.settle();
        assert!(!pair.server.is_handshaking() && !pair.client.is_handshaking());
        pair
    }

    fn client_reads(&mut self) -> Vec<u8> {
        let mut bytes = [0; 64 * 1024];
        let len = self.client.reader().read(&mut bytes).unwrap();
        bytes[..len].to_vec()
    }
}

#[test]
fn both_versions_shake_hands_and_talk_however_the_bytes_are_cut() {
    for version in [&TLS12, &TLS13] {
        for chunk in [1, 7, 4096] {
            let mut pair = Pair::shaken(version, chunk);
            let negotiated = if version.version == ProtocolVersion::TLSv1_2 {
                ProtocolVersion::TLSv1_2
            } else {
                ProtocolVersion::TLSv1_3
            };
            assert_eq!(pair.client.protocol_version(), Some(negotiated));
            let said = vec![b'x'; 20_000];
            pair.client.writer().write_all(&said).unwrap();
            pair.settle();
            assert_eq!(pair.server.plain, said);
            pair.server.encrypt(b"answer").unwrap();
            pair.settle();
            assert_eq!(pair.client_reads(), b"answer");
        }
    }
}

#[test]
fn nothing_is_kept_between_whole_records() {
    let mut pair = Pair::shaken(&TLS13, 4096);
    pair.client.writer().write_all(b"ping").unwrap();
    pair.settle();
    assert_eq!(pair.server.plain.split(), &b"ping"[..]);
    assert_eq!((pair.server.incoming.capacity(), pair.server.outgoing.len()), (0, 0));
}

#[test]
fn new_keys_of_the_client_are_followed_and_answered() {
    let mut pair = Pair::shaken(&TLS13, 5);
    for word in ["one", "two", "three"] {
        pair.client.refresh_traffic_keys().unwrap();
        pair.client.writer().write_all(word.as_bytes()).unwrap();
        pair.settle();
        assert_eq!(pair.server.plain.split(), word);
        pair.server.encrypt(word.as_bytes()).unwrap();
        pair.settle();
        assert_eq!(pair.client_reads(), word.as_bytes());
    }
}

#[test]
fn something_is_written_while_a_record_of_the_client_is_half_there() {
    let mut pair = Pair::shaken(&TLS13, 4096);
    pair.client.writer().write_all(b"later").unwrap();
    let mut bytes = Vec::new();
    pair.client.write_tls(&mut bytes).unwrap();
    let (first, second) = bytes.split_at_mut(9);
    pair.server.receive(first).unwrap();
    pair.server.encrypt(b"meanwhile").unwrap();
    pair.settle();
    assert_eq!(pair.client_reads(), b"meanwhile");
    assert!(pair.server.plain.is_empty());
    pair.server.receive(second).unwrap();
    assert_eq!(pair.server.plain, &b"later"[..]);
}

#[test]
fn a_close_is_told_both_ways() {
    for version in [&TLS12, &TLS13] {
        let mut pair = Pair::shaken(version, 4096);
        pair.server.encrypt(b"last").unwrap();
        pair.server.close().unwrap();
        pair.settle();
        assert_eq!(pair.client_reads(), b"last");
        assert_eq!(pair.client.reader().read(&mut [0; 8]).unwrap(), 0);
        pair.client.send_close_notify();
        pair.settle();
        assert!(pair.server.peer_closed);
    }
}

#[test]
fn what_is_no_tls_is_refused_with_an_alert_whatever_it_is_cut_into() {
    for chunk in [1, 3, 64] {
        let mut server = Pair::new(&TLS13, 1).server;
        let mut noise = *b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
        let refused = noise.chunks_mut(chunk).any(|chunk| server.receive(chunk).is_err());
        assert!(refused);
        assert!(server.encrypt(b"x").is_err());
    }
    // A record that cannot be decrypted, and its alert.
    let mut pair = Pair::shaken(&TLS13, 4096);
    let mut record = [0x17, 3, 3, 0, 32].to_vec();
    record.extend([7; 32]);
    pair.server.receive(&mut record).unwrap_err();
    let alert = pair.server.outgoing.split();
    assert!(pair.client.read_tls(&mut &alert[..]).is_ok_and(|len| len > 0));
    let told = pair.client.process_new_packets().unwrap_err();
    assert!(matches!(told, Error::AlertReceived(rustls::AlertDescription::BadRecordMac)), "{told}");
}
