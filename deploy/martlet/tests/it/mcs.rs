//! device.md section 14 on the wire: the MCS connection itself (MC), and peers that mean harm.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::Arc,
    time::Duration,
};

use martlet_proto::{
    device::mcs::{Close, HeartbeatPing, HeartbeatStat, LoginRequest, Setting},
    mcs::{
        frame::{self, Tag},
        stanza::Stanza,
    },
};
use rustls::ClientConfig;
use serde_json::json;

use crate::{
    app_server::send_json,
    broker::{Broker, ONE, shared},
    device::{Identity, Mcs, PATIENCE, check_in, value},
};

const APP: &str = "com.example.app";

fn login_bytes(version: u8, login: &LoginRequest) -> Vec<u8> {
    frame::encode_first(version, Tag::LoginRequest, login).to_vec()
}

fn ping() -> Stanza {
    Stanza::HeartbeatPing(HeartbeatPing::default())
}

fn acked(mcs: &mut Mcs) -> i32 {
    match mcs.stanza() {
        Stanza::HeartbeatAck(ack) => ack.last_stream_id_received.unwrap(),
        other => panic!("{other:?}"),
    }
}

/// Settings that offer one version of TLS and no server name.
fn tls(broker: &Broker, version: &'static rustls::SupportedProtocolVersion) -> Arc<ClientConfig> {
    let base = martlet_loadtest::device::trusting(&broker.ca_file()).unwrap();
    let provider = Arc::clone(base.crypto_provider());
    let mut roots = rustls::RootCertStore::empty();
    use rustls::pki_types::pem::PemObject as _;
    for cert in rustls::pki_types::CertificateDer::pem_file_iter(broker.ca_file()).unwrap() {
        roots.add(cert.unwrap()).unwrap();
    }
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.enable_sni = false;
    Arc::new(config)
}

#[test]
fn mc_01_tls_1_2_and_1_3_work_without_a_server_name() {
    let broker = shared();
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let identity = check_in(broker);
        let mut mcs = Mcs::open_with(broker, tls(broker, version));
        mcs.write(&login_bytes(41, &identity.login_request()));
        assert!(mcs.login_response().error.is_none());
    }
}

#[test]
fn mc_02_mc_14_the_version_comes_once_and_in_one_write_with_the_login_response() {
    let broker = shared();
    let identity = check_in(broker);
    let config = martlet_loadtest::device::trusting(&broker.ca_file()).unwrap();
    let socket = TcpStream::connect(broker.address("mcs")).unwrap();
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
    let mut stream = rustls::StreamOwned::new(rustls::ClientConnection::new(config, name).unwrap(), socket);
    stream.write_all(&login_bytes(41, &identity.login_request())).unwrap();
    // One TLS record holds what was written at once: one read gives all of it.
    let mut buffer = [0; 4_096];
    let count = stream.read(&mut buffer).unwrap();
    assert_eq!(buffer[..2], [41, Tag::LoginResponse as u8]);
    assert_eq!(count, 3 + usize::from(buffer[2]), "version, tag, size and body, and nothing else");
    // No version byte comes again.
    for _ in 0..2 {
        stream.write_all(&[0, 0]).unwrap();
        let count = stream.read(&mut buffer).unwrap();
        assert_eq!(buffer[0], Tag::HeartbeatAck as u8);
        assert_eq!(count, 2 + usize::from(buffer[1]));
    }
}

/// A socket that remembers what came in, still encrypted.
struct Tap {
    socket: TcpStream,
    came_in: Vec<u8>,
}

impl std::io::Read for Tap {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.socket.read(buffer)?;
        self.came_in.extend_from_slice(&buffer[..count]);
        Ok(count)
    }
}

impl std::io::Write for Tap {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.socket.flush()
    }
}

/// Number of TLS records: a type, a version, and a length of two bytes before each.
fn tls_records(mut bytes: &[u8]) -> usize {
    let mut count = 0;
    while let [_, _, _, high, low, rest @ ..] = bytes {
        bytes = &rest[usize::from(u16::from_be_bytes([*high, *low]))..];
        count += 1;
    }
    count
}

#[test]
fn mc_14_frames_that_are_due_together_are_written_one_by_one() {
    let broker = shared();
    let identity = check_in(broker);
    let config = martlet_loadtest::device::trusting(&broker.ca_file()).unwrap();
    let socket = TcpStream::connect(broker.address("mcs")).unwrap();
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
    let tap = Tap { socket, came_in: Vec::new() };
    let mut stream = rustls::StreamOwned::new(rustls::ClientConnection::new(config, name).unwrap(), tap);
    stream.write_all(&login_bytes(41, &identity.login_request())).unwrap();
    let mut head = [0; 3];
    stream.read_exact(&mut head).unwrap();
    stream.read_exact(&mut vec![0; usize::from(head[2])]).unwrap();
    stream.sock.came_in.clear();
    // Five pings in one write: their answers are due at the same moment.
    stream.write_all(&[0; 10]).unwrap();
    let mut answers = [0; 5 * 4];
    stream.read_exact(&mut answers).unwrap();
    assert!(answers.chunks(4).all(|ack| ack[..3] == [1, 2, 0x10]), "{answers:?}");
    assert_eq!(tls_records(&stream.sock.came_in), 5, "a record is a write");
}

#[test]
fn mc_03_a_version_below_38_is_closed_without_an_answer_and_38_is_answered_by_38() {
    let broker = shared();
    let identity = check_in(broker);
    let mut old = Mcs::open(broker);
    old.write(&login_bytes(37, &identity.login_request()));
    assert_eq!(old.closed(PATIENCE), []);
    let config = martlet_loadtest::device::trusting(&broker.ca_file()).unwrap();
    let socket = TcpStream::connect(broker.address("mcs")).unwrap();
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
    let mut stream = rustls::StreamOwned::new(rustls::ClientConnection::new(config, name).unwrap(), socket);
    stream.write_all(&login_bytes(38, &identity.login_request())).unwrap();
    let mut first = [0; 2];
    stream.read_exact(&mut first).unwrap();
    assert_eq!(first, [38, Tag::LoginResponse as u8]);
}

#[test]
fn mc_04_the_login_response_echoes_the_id_and_acknowledges_the_login() {
    let broker = shared();
    let mut mcs = Mcs::open(broker);
    mcs.write(&login_bytes(41, &check_in(broker).login_request()));
    let response = mcs.login_response();
    assert_eq!(response.id, "chrome-94.0.4606.51");
    assert_eq!(response.last_stream_id_received, Some(1));
    assert!(response.error.is_none());
    // Milliseconds: after 2020 and before 2100.
    assert!((1_577_836_800_000..4_102_444_800_000).contains(&response.server_timestamp.unwrap()));
}

#[test]
fn mc_05_bad_credentials_are_told_and_closed_within_a_second() {
    let broker = shared();
    let identity = check_in(broker);
    let wrong = [
        LoginRequest { auth_token: "7".to_owned(), ..identity.login_request() },
        LoginRequest { user: "8".to_owned(), ..identity.login_request() },
        LoginRequest { resource: "8".to_owned(), ..identity.login_request() },
    ];
    for login in wrong {
        let mut mcs = Mcs::open(broker);
        mcs.write(&login_bytes(41, &login));
        let said = mcs.closed(PATIENCE);
        match &said[..] {
            [Stanza::LoginResponse(response), ..] => assert_ne!(response.error.as_ref().unwrap().code, 0),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn mc_06_a_login_needs_no_auth_service_heartbeat_or_device_id() {
    let broker = shared();
    let identity = check_in(broker);
    let login = LoginRequest {
        id: String::new(),
        domain: String::new(),
        auth_service: None,
        adaptive_heartbeat: None,
        device_id: None,
        ..identity.login_request()
    };
    let mut mcs = Mcs::open(broker);
    mcs.write(&login_bytes(41, &login));
    assert!(mcs.login_response().error.is_none());
}

#[test]
fn mc_07_a_first_frame_that_is_no_login_closes() {
    let broker = shared();
    for first in [&[41, 0, 0][..], &[41, 4, 0], &[41, 8, 2, 8, 1], &[41, 2, 0]] {
        let mut mcs = Mcs::open(broker);
        mcs.write(first);
        let said = mcs.closed(PATIENCE);
        assert!(!said.iter().any(|stanza| matches!(stanza, Stanza::LoginResponse(r) if r.error.is_none())), "{said:?}");
    }
}

#[test]
fn mc_08_a_login_byte_by_byte_is_understood() {
    let broker = shared();
    let mut mcs = Mcs::open(broker);
    for byte in login_bytes(41, &check_in(broker).login_request()) {
        mcs.write(&[byte]);
    }
    assert!(mcs.login_response().error.is_none());
}

#[test]
fn mc_09_sizes_of_up_to_5_bytes_are_understood_and_beyond_the_cap_is_an_error() {
    let broker = shared();
    // 400 bytes and 20,000 bytes of settings: varints of two and three bytes.
    for bytes in [400, 20_000] {
        let setting = vec![Setting { name: "x".to_owned(), value: "y".repeat(bytes) }];
        let login = LoginRequest { setting, ..check_in(broker).login_request() };
        let mut mcs = Mcs::open(broker);
        mcs.write(&login_bytes(41, &login));
        assert!(mcs.login_response().error.is_none(), "{bytes}");
    }
    // The same size spelled with five bytes.
    let mut mcs = check_in(broker).connect(broker);
    mcs.write(&[0, 0x80, 0x80, 0x80, 0x80, 0x00]);
    assert_eq!(acked(&mut mcs), 2);
    // 2 GiB announced, before and after login; a size without end.
    for bomb in [&[8, 0xff, 0xff, 0xff, 0xff, 0x07][..], &[8, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]] {
        let mut mcs = check_in(broker).connect(broker);
        mcs.write(bomb);
        let said = mcs.closed(PATIENCE);
        assert!(matches!(said[..], [Stanza::StreamError(_)]), "{said:?}");
        let mut mcs = Mcs::open(broker);
        mcs.write(&[&[41][..], &[2], &bomb[1..]].concat());
        mcs.closed(PATIENCE);
    }
}

#[test]
fn mc_10_an_empty_ping_is_answered_with_the_number_received() {
    let mut mcs = check_in(shared()).connect(shared());
    mcs.write(&[0, 0]);
    assert_eq!(acked(&mut mcs), 2);
}

#[test]
fn mc_11_after_login_and_three_pings_the_ack_reports_4() {
    let mut mcs = check_in(shared()).connect(shared());
    let acks: Vec<_> = (0..3)
        .map(|_| {
            mcs.send(&ping());
            acked(&mut mcs)
        })
        .collect();
    assert_eq!(acks, [2, 3, 4]);
}

#[test]
fn mc_12_an_obsolete_tag_is_skipped_and_counted() {
    let mut mcs = check_in(shared()).connect(shared());
    mcs.write(&[6, 3, 1, 2, 3]);
    mcs.write(&[15, 0]);
    mcs.send(&ping());
    assert_eq!(acked(&mut mcs), 4);
}

#[test]
fn mc_13_the_server_says_nothing_obsolete_in_a_life_with_everything_in_it() {
    let broker = shared();
    let identity = check_in(broker);
    let token = identity.register(broker, APP, ONE.0);
    let mut mcs = identity.connect(broker);
    let mut tags = Vec::new();
    mcs.send(&ping());
    for round in 0..3 {
        send_json(&broker.address("http"), ONE.1, &json!({ "to": token, "data": { "round": round } }));
    }
    mcs.write(&[6, 0]);
    mcs.send(&ping());
    mcs.write(&[10, 200]);
    while let Ok(Some(frame)) = mcs.frame(Duration::from_secs(2)) {
        tags.push(frame.tag);
    }
    assert!(tags.len() >= 5, "{tags:?}");
    assert!(tags.iter().all(|tag| [0, 1, 3, 4, 7, 8, 10].contains(tag)), "{tags:?}");
}

#[test]
fn mc_15_a_second_login_takes_over() {
    let broker = shared();
    let identity = check_in(broker);
    let token = identity.register(broker, APP, ONE.0);
    let send = |k: &str| {
        let answer = send_json(&broker.address("http"), ONE.1, &json!({ "to": token, "data": { "k": k } }));
        assert_eq!(answer.json()["success"], 1);
    };
    let mut first = identity.connect(broker);
    for k in ["acknowledged", "not acknowledged"] {
        send(k);
        assert_eq!(value(&first.message(), "k"), Some(k));
        if k == "acknowledged" {
            first.ack_all();
        }
    }
    let mut second = identity.connect(broker);
    assert_eq!(first.closed(PATIENCE).last(), Some(&Stanza::Close));
    // The queue goes on where the first left it.
    send("later");
    for k in ["not acknowledged", "later"] {
        assert_eq!(value(&second.message(), "k"), Some(k));
    }
    second.no_message();
}

#[test]
fn mc_17_a_client_that_asks_for_pings_gets_them_at_its_interval() {
    let broker = shared();
    let wishes = [
        LoginRequest {
            heartbeat_stat: Some(HeartbeatStat { ip: String::new(), timeout: true, interval_ms: 1_000 }),
            ..check_in(broker).login_request()
        },
        LoginRequest {
            setting: vec![Setting { name: "hbping".to_owned(), value: "1000".to_owned() }],
            ..check_in(broker).login_request()
        },
    ];
    for login in wishes {
        let mut mcs = Mcs::open(broker);
        mcs.write(&login_bytes(41, &login));
        mcs.login_response();
        for _ in 0..2 {
            assert!(matches!(mcs.stanza(), Stanza::HeartbeatPing(_)));
            mcs.send(&ping());
            assert!(matches!(mcs.stanza(), Stanza::HeartbeatAck(_)));
        }
    }
}

#[test]
fn mc_18_a_client_that_answers_pings_by_pings_is_kept() {
    let broker = shared();
    let stat = HeartbeatStat { ip: String::new(), timeout: true, interval_ms: 1_000 };
    let identity = check_in(broker);
    let token = identity.register(broker, APP, ONE.0);
    let mut mcs =
        identity.connect_with(broker, LoginRequest { heartbeat_stat: Some(stat), ..identity.login_request() });
    let mut pings = 0;
    while pings < 4 {
        match mcs.stanza() {
            Stanza::HeartbeatPing(_) => {
                pings += 1;
                mcs.send(&ping());
            }
            Stanza::HeartbeatAck(_) => {}
            other => panic!("{other:?}"),
        }
    }
    send_json(&broker.address("http"), ONE.1, &json!({ "to": token, "data": { "k": "v" } }));
    assert_eq!(value(&mcs.message(), "k"), Some("v"));
}

#[test]
fn promise_7_garbage_instead_of_tls_is_dropped_and_others_are_served() {
    let broker = shared();
    let mut hostile = Vec::new();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0x16, 3, 1, 0xff, 0xff, 1, 2, 3], &[0; 4_096]] {
        for listener in ["mcs", "https"] {
            let mut socket = TcpStream::connect(broker.address(listener)).unwrap();
            // It may be closed already when we write.
            let _ = socket.write_all(garbage);
            hostile.push(socket);
        }
    }
    let identity: Identity = check_in(broker);
    let mut mcs = identity.connect(broker);
    mcs.send(&ping());
    assert_eq!(acked(&mut mcs), 2);
    let mut garbled = identity.connect(broker);
    garbled.write(&[8, 4, 0xff, 0xff, 0xff, 0xff]);
    assert!(matches!(garbled.closed(PATIENCE)[..], [.., Stanza::StreamError(_)]));
    assert!(garbled.try_write(&frame::encode(Tag::Close, &Close {})).is_err() || garbled.fill(PATIENCE) == Some(false));
}
