//! Device connections over real TLS, to a gateway's MCS listener with a node in memory behind it.

mod device;

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use martlet_gateway::{
    attach::{AttachConfig, AttachMetrics, Attachments, Routes, ShardMap},
    clock::SystemClock,
    mcs::{Credentials, Identity, Mcs, McsConfig, McsMetrics, OpenDoor},
};
use martlet_proto::{
    cluster::queue::{Message, Pair, Payload},
    device::mcs::{DataMessageStanza, HeartbeatPing, LoginRequest, Setting},
    mcs::stanza::{Stanza, selective_ack, stream_ack},
    message::MessageId,
    shard::{Shard, ShardCount},
    tag::{AndroidId, CheckinKey, DeviceTag, SecurityToken, TagKey},
};
use prost::Message as _;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::{Channel, Endpoint};

use self::device::{Device, PATIENCE, first_bytes};
use crate::fake_node::FakeNode;

const NODE: u64 = 1;

#[derive(Debug)]
struct OneNode {
    address: SocketAddr,
    map: watch::Sender<Option<ShardMap>>,
}

impl Routes for OneNode {
    fn map(&self) -> watch::Receiver<Option<ShardMap>> {
        self.map.subscribe()
    }

    fn channel(&self, node_id: u64) -> Option<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        (node_id == NODE).then(|| endpoint.connect_lazy())
    }

    fn leads(&self, _shard: Shard, node_id: u64, _term: u64) {
        assert_eq!(node_id, NODE);
    }
}

#[derive(Debug)]
struct Keys {
    checkin: CheckinKey,
    tag: TagKey,
}

impl Credentials for Keys {
    fn authenticate(&self, android_id: AndroidId, token: SecurityToken) -> Identity {
        match self.checkin.security_token(android_id).ct_eq(token) {
            true => Identity::Device(self.tag.tag(android_id)),
            false => Identity::Wrong,
        }
    }
}

/// A gateway's MCS side, and what a test needs to come in.
struct Gateway {
    address: SocketAddr,
    tls: Arc<rustls::ClientConfig>,
    keys: Arc<Keys>,
    drain: CancellationToken,
    stop: CancellationToken,
    tasks: TaskTracker,
    attachments: Attachments,
    metrics: Arc<McsMetrics>,
}

impl Gateway {
    async fn start(node: &FakeNode, config: McsConfig) -> Self {
        Self::start_as(7, node, config).await
    }

    /// As the gateway of this name.
    async fn start_as(name: u8, node: &FakeNode, config: McsConfig) -> Self {
        let map = ShardMap {
            count: ShardCount::new(1).unwrap(),
            nodes: vec![NODE],
            replicas: BTreeMap::from([(Shard(0), vec![NODE])]),
        };
        let routes = Arc::new(OneNode { address: node.address, map: watch::Sender::new(Some(map)) });
        let keys = Arc::new(Keys { checkin: CheckinKey::new(1, [1; 32]), tag: TagKey::new([2; 32]) });
        let (stop, drain) = (CancellationToken::new(), CancellationToken::new());
        let attach = AttachConfig { retry_min: Duration::from_millis(10), ..AttachConfig::default() };
        let (clock, attach_metrics) = (Arc::new(SystemClock), Arc::new(AttachMetrics::default()));
        let attachments = Attachments::start(&attach, [name; 16], routes, clock.clone(), attach_metrics, &stop);
        let metrics = Arc::new(McsMetrics::default());
        let (certificate, tls) = certificate();
        let mcs = Mcs::new(config, keys.clone(), Arc::new(OpenDoor), attachments.clone(), clock, Arc::clone(&metrics));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tasks = TaskTracker::new();
        tasks.spawn(Arc::new(mcs).serve(listener, certificate, drain.clone()));
        tasks.close();
        Self { address, tls, keys, drain, stop, tasks, attachments, metrics }
    }

    async fn with_node() -> (Self, FakeNode) {
        let node = FakeNode::start().await;
        (Self::start(&node, McsConfig::default()).await, node)
    }

    async fn connect(&self) -> Device {
        Device::connect(self.address, Arc::clone(&self.tls)).await
    }

    fn tag(&self, device: u64) -> DeviceTag {
        self.keys.tag.tag(AndroidId::new(device).unwrap())
    }

    fn login(&self, device: u64) -> LoginRequest {
        let android_id = AndroidId::new(device).unwrap();
        device::login(android_id, self.keys.checkin.security_token(android_id))
    }

    /// A device that is logged in.
    async fn device(&self, device: u64) -> Device {
        let mut connection = self.connect().await;
        let response = connection.login(&self.login(device)).await;
        assert_eq!(response.error, None);
        connection
    }
}

fn certificate() -> (Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>) {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let signed = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(signed.signing_key.serialize_der()));
    let server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![signed.cert.der().clone()], key)
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(signed.cert.der().clone()).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    (Arc::new(server), Arc::new(client))
}

fn message(number: u64) -> Message {
    let payload =
        Payload { app_data: vec![Pair { key: "n".into(), value: number.to_string() }], raw_data: Bytes::new() };
    Message {
        message_id: Bytes::copy_from_slice(&message_id(number).to_bytes()),
        wire_from: "123456789012".into(),
        application: "com.example.app".into(),
        ttl_secs: 600,
        accepted_ms: 1_700_000_000_123,
        payload: payload.encode_to_vec().into(),
        ..Message::default()
    }
}

fn message_id(number: u64) -> MessageId {
    MessageId { micros: 1_700_000_000_000_000 + number, random: number }
}

fn id(number: u64) -> Option<String> {
    Some(message_id(number).to_string())
}

/// Polls until it is so; never sleeps longer than it must.
async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let wait = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never so: {what}"));
}

#[tokio::test]
async fn mc_04_core_a_login_is_answered_and_a_message_arrives_with_its_fields() {
    let (gateway, node) = Gateway::with_node().await;
    let mut device = gateway.connect().await;
    let response = device.login(&gateway.login(1)).await;
    assert_eq!(device.version(), Some(41));
    assert_eq!((response.id.as_str(), response.last_stream_id_received), ("chrome-94.0.4606.51", Some(1)));
    assert!(response.error.is_none() && response.server_timestamp.unwrap() > 1_700_000_000_000);
    let sequence = node.enqueue(gateway.tag(1), message(1));
    let data = device.data().await;
    assert_eq!(data.persistent_id, id(1));
    assert_eq!((data.from.as_str(), data.category.as_str()), ("123456789012", "com.example.app"));
    assert_eq!((data.ttl, data.sent), (Some(600), Some(1_700_000_000_123)));
    assert_eq!(data.app_data[0].value, "1");
    eventually("written is told", || node.written(gateway.tag(1)) == Some(sequence)).await;
}

#[tokio::test]
async fn mc_01_core_tls_1_2_and_1_3_work_without_sni() {
    let (gateway, _node) = Gateway::with_node().await;
    for (version, expected) in [
        (&rustls::version::TLS12, rustls::ProtocolVersion::TLSv1_2),
        (&rustls::version::TLS13, rustls::ProtocolVersion::TLSv1_3),
    ] {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Arc::new(AnyCertificate(provider.clone()));
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        let mut device = Device::connect(gateway.address, Arc::new(tls)).await;
        assert_eq!(device.tls_version(), Some(expected));
        assert_eq!(device.login(&gateway.login(1)).await.error, None);
    }
}

/// Verifies nothing, as push-receiver does.
#[derive(Debug)]
struct AnyCertificate(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[tokio::test]
async fn mc_08_core_a_login_split_byte_by_byte_is_understood() {
    let (gateway, _node) = Gateway::with_node().await;
    let mut device = gateway.connect().await;
    for byte in first_bytes(41, &gateway.login(1)) {
        device.write(&[byte]).await;
    }
    assert!(matches!(device.next().await, Some(Stanza::LoginResponse(response)) if response.error.is_none()));
    // Login, and this ping byte by byte: the second frame.
    device.write(&[0]).await;
    device.write(&[0]).await;
    assert!(matches!(device.next().await, Some(Stanza::HeartbeatAck(ack)) if ack.last_stream_id_received == Some(2)));
}

#[tokio::test]
async fn mc_08_core_frames_that_come_together_with_the_login_are_served() {
    let (gateway, _node) = Gateway::with_node().await;
    let mut device = gateway.connect().await;
    let together = [&first_bytes(38, &gateway.login(1))[..], &[0, 0, 0, 0]].concat();
    device.write(&together).await;
    assert!(matches!(device.next().await, Some(Stanza::LoginResponse(_))));
    assert_eq!(device.version(), Some(38));
    for number in [2, 3] {
        let ack = device.next().await;
        assert!(matches!(ack, Some(Stanza::HeartbeatAck(ack)) if ack.last_stream_id_received == Some(number)));
    }
}

#[tokio::test]
async fn mc_05_core_wrong_credentials_are_answered_and_the_connection_closed() {
    let (gateway, _node) = Gateway::with_node().await;
    let mut device = gateway.connect().await;
    let response = device.login(&LoginRequest { auth_token: "1".into(), ..gateway.login(1) }).await;
    assert_eq!(response.error.unwrap().code, 401);
    assert_eq!(device.next().await, None);
    assert_eq!(gateway.metrics.logins.get(), 0);
}

#[tokio::test]
async fn mc_03_core_hostile_first_bytes_end_the_connection_and_nothing_else() {
    let (gateway, _node) = Gateway::with_node().await;
    let bomb = [0x29, 0x02, 0xff, 0xff, 0xff, 0xff, 0x0f];
    let endless = [0x29, 0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    for (bytes, answered) in [
        (&[37, 0, 0][..], false),
        (&[0][..], false),
        // Not a login first.
        (&[0x29, 0, 0][..], false),
        (&[0x29, 8, 0][..], false),
        // A login of garbage, an empty one.
        (&[0x29, 2, 3, 0xff, 0xff, 0xff][..], false),
        (&[0x29, 2, 0][..], false),
        (&bomb[..], true),
        (&endless[..], true),
    ] {
        let mut device = gateway.connect().await;
        device.write(bytes).await;
        let answer = device.next().await;
        assert_eq!(matches!(answer, Some(Stanza::StreamError(_))), answered, "{bytes:?}: {answer:?}");
        if answered {
            assert_eq!(device.next().await, None, "{bytes:?}");
        }
    }
    gateway.device(1).await;
}

#[tokio::test]
async fn bytes_that_are_no_tls_end_the_connection_and_nothing_else() {
    let (gateway, _node) = Gateway::with_node().await;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 5000], &[0x16, 3, 1, 0xff, 0xff, 0xff]] {
        let mut socket = TcpStream::connect(gateway.address).await.unwrap();
        socket.write_all(bytes).await.unwrap();
        socket.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // An alert or a reset.
        let read = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut answer)).await;
        assert!(read.is_ok(), "the connection ends");
    }
    let mut device = gateway.device(1).await;
    assert_eq!(device.pong().await, Some(2));
}

#[tokio::test]
async fn mc_07_core_a_connection_that_never_logs_in_is_closed() {
    let node = FakeNode::start().await;
    let config = McsConfig { login_timeout: Duration::from_millis(50), ..McsConfig::default() };
    let gateway = Gateway::start(&node, config).await;
    let mut device = gateway.connect().await;
    device.write(&[0x29, 2]).await;
    assert_eq!(device.next().await, None);
}

#[tokio::test]
async fn mc_09_core_a_frame_above_the_cap_is_answered_with_a_stream_error_and_close() {
    let (gateway, node) = Gateway::with_node().await;
    let mut device = gateway.device(1).await;
    device.write(&[8, 0xff, 0xff, 0x7f, 0]).await;
    assert!(matches!(device.next().await, Some(Stanza::StreamError(_))));
    assert_eq!(device.next().await, None);
    eventually("it is detached", || !node.is_attached(gateway.tag(1))).await;
}

#[tokio::test]
async fn a_frame_that_begins_and_never_ends_costs_the_connection() {
    let node = FakeNode::start().await;
    let config = McsConfig { frame_timeout: Duration::from_millis(50), ..McsConfig::default() };
    let gateway = Gateway::start(&node, config).await;
    let mut device = gateway.device(1).await;
    device.write(&[8, 100, 1, 2, 3]).await;
    assert_eq!(device.next().await, Some(Stanza::Close));
    assert_eq!(device.next().await, None);
}

#[tokio::test]
async fn mc_15_core_a_second_login_takes_the_queue_over_and_the_first_is_told_to_close() {
    let (gateway, node) = Gateway::with_node().await;
    let mut first = gateway.device(1).await;
    node.enqueue(gateway.tag(1), message(1));
    assert_eq!(first.data().await.persistent_id, id(1));
    let mut second = gateway.device(1).await;
    assert_eq!(first.next().await, Some(Stanza::Close));
    assert_eq!(first.next().await, None);
    // What the first did not acknowledge belongs to the second, under the same name.
    assert_eq!(second.data().await.persistent_id, id(1));
    node.enqueue(gateway.tag(1), message(2));
    assert_eq!(second.data().await.persistent_id, id(2));
    assert_eq!(gateway.metrics.sessions.get(), 1);
}

#[tokio::test]
async fn mc_15_core_a_login_at_another_gateway_takes_over_and_an_old_session_does_not_come_back() {
    let node = FakeNode::start().await;
    let one = Gateway::start_as(1, &node, McsConfig::default()).await;
    let other = Gateway::start_as(2, &node, McsConfig::default()).await;
    let mut first = one.device(1).await;
    eventually("it is attached", || node.is_attached(one.tag(1))).await;
    let mut second = other.device(1).await;
    assert_eq!(first.next().await, Some(Stanza::Close));
    assert_eq!(first.next().await, None);
    node.enqueue(other.tag(1), message(1));
    assert_eq!(second.data().await.persistent_id, id(1));
}

#[tokio::test]
async fn dl_03_core_an_unacked_message_comes_again_after_a_reconnect_with_the_same_persistent_id() {
    let (gateway, node) = Gateway::with_node().await;
    for number in 1..=3 {
        node.enqueue(gateway.tag(1), message(number));
    }
    for _ in 0..2 {
        let mut device = gateway.device(1).await;
        for number in 1..=3 {
            assert_eq!(device.data().await.persistent_id, id(number), "dl_02: oldest first");
        }
    }
}

#[tokio::test]
async fn dl_04_core_a_cumulative_ack_removes_and_is_confirmed_only_when_it_is_applied() {
    let (gateway, node) = Gateway::with_node().await;
    let mut device = gateway.device(1).await;
    for number in 1..=3 {
        node.enqueue(gateway.tag(1), message(number));
        device.data().await;
    }
    node.hold_acks();
    // The login response was frame 1: frames 2 and 3 are the first two messages.
    device.ping(Some(3)).await;
    assert!(matches!(device.next().await, Some(Stanza::HeartbeatAck(ack)) if ack.last_stream_id_received == Some(1)));
    eventually("the acks came", || node.waiting(gateway.tag(1)) == [message_id(3)]).await;
    assert_eq!(device.pong().await, Some(1));
    node.confirm_acks();
    let mut number = device.pong().await;
    while number == Some(1) {
        number = device.pong().await;
    }
    assert!(number >= Some(4));
}

#[tokio::test]
async fn dl_05_core_dl_06_core_stream_ack_and_selective_ack_remove_what_they_name() {
    let (gateway, node) = Gateway::with_node().await;
    let mut device = gateway.device(1).await;
    for number in 1..=4 {
        node.enqueue(gateway.tag(1), message(number));
        device.data().await;
    }
    let selective = selective_ack(vec![id(2).unwrap(), "u-1".into(), id(99).unwrap()], None);
    device.send(&Stanza::Iq(Box::new(selective))).await;
    eventually("2 is gone", || node.waiting(gateway.tag(1)) == [1, 3, 4].map(message_id)).await;
    device.send(&Stanza::Iq(Box::new(stream_ack(4)))).await;
    eventually("1 and 3 are gone", || node.waiting(gateway.tag(1)) == [message_id(4)]).await;
}

#[tokio::test]
async fn dl_07_core_ids_of_the_login_are_removed_before_the_queue_is_sent() {
    let (gateway, node) = Gateway::with_node().await;
    for number in 1..=3 {
        node.enqueue(gateway.tag(1), message(number));
    }
    let received_persistent_id = vec![id(1).unwrap(), "nonsense".into(), id(3).unwrap(), id(77).unwrap()];
    let mut device = gateway.connect().await;
    device.login(&LoginRequest { received_persistent_id, ..gateway.login(1) }).await;
    assert_eq!(device.data().await.persistent_id, id(2));
    node.enqueue(gateway.tag(1), message(4));
    assert_eq!(device.data().await.persistent_id, id(4));
    assert_eq!(node.waiting(gateway.tag(1)), [2, 4].map(message_id));
}

#[tokio::test]
async fn dl_07_core_a_login_whose_acks_are_not_confirmed_in_time_is_answered_all_the_same() {
    let node = FakeNode::start().await;
    let config = McsConfig { login_ack_wait: Duration::from_millis(50), ..McsConfig::default() };
    let gateway = Gateway::start(&node, config).await;
    node.hold_acks();
    let mut device = gateway.connect().await;
    let received_persistent_id = vec![id(1).unwrap()];
    device.login(&LoginRequest { received_persistent_id, ..gateway.login(1) }).await;
    assert_eq!(device.pong().await, Some(1));
    node.confirm_acks();
    while device.pong().await == Some(1) {}
}

#[tokio::test]
async fn dl_10_core_a_device_that_never_acks_receives_more_than_the_window_and_the_credit_hold() {
    let node = FakeNode::start().await;
    let gateway = Gateway::start(&node, McsConfig { unacked_max: 10, ..McsConfig::default() }).await;
    let mut device = gateway.device(1).await;
    // 65 of the fake's deliveries fit the credit of a device.
    for number in 1..=300 {
        node.enqueue(gateway.tag(1), message(number));
    }
    for number in 1..=300 {
        assert_eq!(device.data().await.persistent_id, id(number));
    }
    assert_eq!(node.waiting(gateway.tag(1)).len(), 300);
}

#[tokio::test]
async fn dl_12_core_now_or_never_has_no_persistent_id_and_dl_13_core_expired_is_not_written() {
    let (gateway, node) = Gateway::with_node().await;
    let mut device = gateway.device(1).await;
    eventually("it is attached", || node.is_attached(gateway.tag(1))).await;
    node.hand_out(gateway.tag(1), Message { ttl_secs: 0, ..message(1) }, 0);
    node.hand_out(gateway.tag(1), Message { ttl_secs: 0, ..message(2) }, 1_000_000);
    let data = device.data().await;
    // The first may have been quick enough: it had until the millisecond of its arrival.
    let data = if data.app_data[0].value == "1" { device.data().await } else { data };
    assert_eq!((data.persistent_id, data.app_data[0].value.as_str()), (None, "2"));
}

#[tokio::test]
async fn a_new_term_and_lost_streams_cost_nothing_but_time_and_nothing_is_written_twice() {
    let (gateway, node) = Gateway::with_node().await;
    let mut device = gateway.device(1).await;
    let mut next = 1;
    for round in 0..3 {
        for _ in 0..5 {
            node.enqueue(gateway.tag(1), message(next));
            assert_eq!(device.data().await.persistent_id, id(next), "round {round}");
            next += 1;
        }
        let attaches = node.attaches().len();
        if round % 2 == 0 {
            node.new_term()
        } else {
            node.drop_streams()
        }
        eventually("it attached again", || node.attaches().len() > attaches).await;
    }
    node.enqueue(gateway.tag(1), message(next));
    assert_eq!(device.data().await.persistent_id, id(next));
    let attaches = node.attaches();
    assert_eq!(attaches[0].session, None);
    let sessions: Vec<_> = attaches[1..].iter().map(|attach| attach.session.unwrap().counter).collect();
    assert!(sessions.windows(2).all(|pair| pair[0] == pair[1]), "the connection keeps its session: {sessions:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_devices_receive_everything_once_and_in_order_across_terms_and_lost_streams() {
    const DEVICES: u64 = 100;
    const MESSAGES: u64 = 30;
    let (gateway, node) = Gateway::with_node().await;
    let mut reading = tokio::task::JoinSet::new();
    for number in 1..=DEVICES {
        let mut device = gateway.device(number).await;
        reading.spawn(async move {
            for message in 1..=MESSAGES {
                assert_eq!(device.data().await.persistent_id, id(message), "device {number}");
            }
            device
        });
    }
    for number in 1..=MESSAGES {
        for device in 1..=DEVICES {
            node.enqueue(gateway.tag(device), message(number));
        }
        match number % 10 {
            3 => node.new_term(),
            7 => node.drop_streams(),
            _ => {}
        }
        // Lets the streams move between the disturbances.
        tokio::task::yield_now().await;
    }
    let devices = tokio::time::timeout(PATIENCE, reading.join_all()).await.unwrap();
    assert_eq!(devices.len(), 100);
    // Acknowledged at once by all; the login was frame 1.
    for mut device in devices {
        device.ping(Some(i32::try_from(MESSAGES).unwrap() + 1)).await;
        // The answer to the ping: nothing else was written meanwhile.
        assert!(matches!(device.next().await, Some(Stanza::HeartbeatAck(_))));
    }
    for device in 1..=DEVICES {
        eventually("everything is acknowledged", || node.waiting(gateway.tag(device)).is_empty()).await;
    }
}

#[tokio::test]
async fn an_ack_that_was_lost_with_its_stream_is_sent_again() {
    let (gateway, node) = Gateway::with_node().await;
    let mut device = gateway.device(1).await;
    node.enqueue(gateway.tag(1), message(1));
    device.data().await;
    node.hold_acks();
    device.ping(Some(2)).await;
    device.next().await;
    eventually("the ack came", || node.acks_seen() == 1).await;
    node.drop_streams();
    node.confirm_acks();
    eventually("it came again", || node.acks_seen() == 2).await;
    while device.pong().await == Some(1) {}
}

#[tokio::test]
async fn mc_17_core_hbping_makes_the_server_ping_and_mc_18_core_a_ping_for_a_ping_keeps_the_connection() {
    let (gateway, _node) = Gateway::with_node().await;
    let mut device = gateway.connect().await;
    // The least a device may wish for is a second.
    let setting = vec![Setting { name: "hbping".into(), value: "1".into() }];
    device.login(&LoginRequest { setting, ..gateway.login(1) }).await;
    for _ in 0..2 {
        assert_eq!(device.next().await, Some(Stanza::HeartbeatPing(HeartbeatPing::default())));
        device.pong().await;
    }
}

#[tokio::test]
async fn a_device_that_does_not_read_is_dropped_and_holds_up_nobody() {
    let node = FakeNode::start().await;
    let config = McsConfig { write_timeout: Duration::from_millis(200), ..McsConfig::default() };
    let gateway = Gateway::start(&node, config).await;
    let deaf = gateway.device(1).await;
    let mut device = gateway.device(2).await;
    let big = Message {
        payload: Payload { app_data: vec![], raw_data: vec![7; 4_096].into() }.encode_to_vec().into(),
        ..message(1)
    };
    // More than all buffers of loopback between the two.
    for _ in 0..4_000 {
        node.enqueue(gateway.tag(1), big.clone());
    }
    for number in 1..=100 {
        node.enqueue(gateway.tag(2), message(number));
        assert_eq!(device.data().await.persistent_id, id(number));
    }
    eventually("the deaf one is dropped", || !node.is_attached(gateway.tag(1))).await;
    assert_eq!(node.waiting(gateway.tag(1)).len(), 4_000);
    drop(deaf);
}

#[tokio::test]
async fn an_upstream_message_is_answered_with_send_error_and_the_internal_one_is_swallowed() {
    let (gateway, _node) = Gateway::with_node().await;
    let mut device = gateway.device(1).await;
    let mut data = DataMessageStanza {
        id: Some("u-1".into()),
        from: "gcm@chrome.com".into(),
        to: Some("123456789012@gcm.googleapis.com".into()),
        category: "com.google.android.gsf.gtalkservice".into(),
        persistent_id: Some("7".into()),
        ..DataMessageStanza::default()
    };
    device.send(&Stanza::Data(Box::new(data.clone()))).await;
    data.category = "com.example.app".into();
    device.send(&Stanza::Data(Box::new(data))).await;
    let error = device.data().await;
    assert_eq!(error.persistent_id.as_deref(), Some("u-1"));
    assert_eq!(error.app_data[0].value, "send_error");
}

#[tokio::test]
async fn a_drain_says_close_to_every_device_and_ends() {
    let node = FakeNode::start().await;
    let config = McsConfig { drain_spread: Duration::from_millis(50), ..McsConfig::default() };
    let gateway = Gateway::start(&node, config).await;
    let mut devices = Vec::new();
    for number in 1..=10 {
        devices.push(gateway.device(number).await);
    }
    let _never_logs_in = gateway.connect().await;
    gateway.drain.cancel();
    for device in &mut devices {
        assert_eq!(device.next().await, Some(Stanza::Close));
        assert_eq!(device.next().await, None);
    }
    tokio::time::timeout(PATIENCE, gateway.tasks.wait()).await.unwrap();
    gateway.stop.cancel();
    tokio::time::timeout(PATIENCE, gateway.attachments.stopped()).await.unwrap();
    assert_eq!((gateway.metrics.connections.get(), gateway.metrics.sessions.get()), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn dl_04_core_more_acks_at_once_than_a_node_takes_are_all_applied() {
    const COUNT: u64 = 60_000;
    let node = FakeNode::start().await;
    let unacked_max = usize::try_from(COUNT).unwrap();
    let gateway = Gateway::start(&node, McsConfig { unacked_max, ..McsConfig::default() }).await;
    let mut device = gateway.device(1).await;
    let tag = gateway.tag(1);
    for number in 1..=COUNT {
        node.enqueue(tag, message(number));
    }
    for number in 1..=COUNT {
        assert_eq!(device.data().await.persistent_id, id(number));
    }
    node.hold_acks();
    device.ping(Some(i32::try_from(COUNT + 1).unwrap())).await;
    let answered = device.next().await;
    assert!(
        matches!(&answered, Some(Stanza::HeartbeatAck(ack)) if ack.last_stream_id_received == Some(1)),
        "{answered:?}"
    );
    eventually("the first part is taken", || node.acks_seen() == 1).await;
    assert_eq!(device.pong().await, Some(1), "not confirmed before all of it is applied");
    node.confirm_acks();
    eventually("all acks are applied", || node.waiting(tag).is_empty()).await;
    let confirmed = tokio::time::timeout(PATIENCE, async { while device.pong().await < Some(3) {} });
    confirmed.await.expect("the frame with the acks is confirmed");
}
