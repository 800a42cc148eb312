//! Peers that mean harm, limits that are reached: on the built executable. Whatever one client does, it
//! gets the protocol's own error or a close, the limit is counted, and the others are served.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use martlet_proto::{
    device::mcs::{LoginRequest, Setting},
    mcs::{
        frame::{self, Tag},
        stanza::Stanza,
    },
};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::{
    app_server::{Answer, Http, send_form, send_json},
    broker::{Broker, ONE, shared, text},
    device::{Mcs, PATIENCE, check_in, value},
};

pub(crate) const APP: &str = "com.example.app";
const MIB: usize = 1 << 20;

/// A broker with this configuration.
pub(crate) fn broker_with(config: &str) -> Broker {
    // Read once, before the broker is ready.
    Broker::start_with(&["--config", text(config_file(config).path())])
}

/// A file with this configuration, for a broker that is started more than once.
pub(crate) fn config_file(config: &str) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), config).unwrap();
    file
}

/// The head of a send with these further lines, each with its end.
pub(crate) fn head(further: &str) -> String {
    format!(
        "POST /gcm/send HTTP/1.1\r\nHost: x\r\nAuthorization: key={}\r\nContent-Type: application/json\r\n{further}\r\n",
        ONE.1
    )
}

/// Asserts that a new device can enrol, connect and be reached, and that nothing has panicked.
pub(crate) fn others_are_served(broker: &Broker) {
    let identity = check_in(broker);
    let token = identity.register(broker, APP, ONE.0);
    let mut mcs = identity.connect(broker);
    accepted(&send_json(&broker.address("http"), ONE.1, &json!({ "to": token, "data": { "k": "v" } })));
    assert_eq!(value(&mcs.message(), "k"), Some("v"));
    let log = broker.log_text();
    assert!(!log.contains("panicked at"), "{log}");
}

/// Asserts one result with a message id.
pub(crate) fn accepted(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.text());
    let json = answer.json();
    json["results"][0]["message_id"].as_str().unwrap_or_else(|| panic!("{json}")).to_owned()
}

pub(crate) fn limits(broker: &Broker, limit: &str) -> f64 {
    broker.metric(&format!("martlet_gateway_limits_reached_total{{limit=\"{limit}\"}}"))
}

/// Waits until `what` holds.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "never: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

// ------------------------------------------------------------------------------------------- HTTP: heads and bodies

#[test]
fn promise_7_too_many_headers_and_one_huge_header_give_431_and_are_counted() {
    let broker = shared();
    let before = limits(broker, "Head");
    let many: String = (0..200).map(|number| format!("X-{number}: y\r\n")).collect();
    let huge = format!("X-Huge: {}\r\n", "y".repeat(MIB));
    for further in [many, huge] {
        let mut http = Http::connect(&broker.address("http"));
        // It may be closed before all of it is written, and what is unread then may reset the connection.
        let is_whole = http.try_write(head(&further).as_bytes()).is_ok() && further.len() < MIB;
        let answer = http.try_answer();
        assert!(answer.as_ref().map_or(!is_whole, |answer| answer.status == 431), "{answer:?}");
        assert!(http.try_answer().is_none(), "the connection ends");
    }
    until("both are counted", || limits(broker, "Head") >= before + 2.0);
    others_are_served(broker);
}

#[test]
fn promise_8_slow_heads_and_bodies_end_at_their_timeouts_and_are_counted() {
    let broker = broker_with("[http]\nheader_timeout = \"1s\"\nbody_timeout = \"1s\"\n");
    let address = broker.address("http");
    let mut silent = Http::connect(&address);
    let mut dripping = Http::connect(&address);
    let mut promised = Http::connect(&address);
    promised.write(head("Content-Length: 100\r\n").as_bytes());
    promised.write(b"{");
    let mut chunked = Http::connect(&address);
    chunked.write(head("Transfer-Encoding: chunked\r\n").as_bytes());
    chunked.write(b"1\r\n{\r\n");
    // Byte by byte: each is progress, and still the head must come to its end.
    dripping.write(b"POST /gcm/send HTTP/1.1\r\nX: ");
    let begun = Instant::now();
    while dripping.try_write(b"y").is_ok() {
        assert!(begun.elapsed() < PATIENCE, "an endless head is read for ever");
        thread::sleep(Duration::from_millis(50));
    }
    assert!(silent.try_answer().is_none());
    for mut late in [promised, chunked] {
        assert_eq!(late.answer().status, 408);
        assert!(late.try_answer().is_none(), "the connection ends");
    }
    until("all are counted", || limits(&broker, "Slow") >= 4.0);
    others_are_served(&broker);
}

#[test]
fn promise_7_promise_8_ten_mib_give_413_with_a_length_and_chunked_and_are_counted() {
    let broker = shared();
    let before = limits(broker, "Body");
    let body = vec![b' '; 10 * MIB];
    for chunked in [false, true] {
        let mut http = Http::connect(&broker.address("http"));
        if chunked {
            http.write(head("Transfer-Encoding: chunked\r\n").as_bytes());
            for chunk in body.chunks(64 << 10) {
                let framed = [format!("{:x}\r\n", chunk.len()).as_bytes(), chunk, b"\r\n"].concat();
                if http.try_write(&framed).is_err() {
                    break;
                }
            }
        } else {
            http.write(head(&format!("Content-Length: {}\r\n", body.len())).as_bytes());
            let _ = http.try_write(&body);
        }
        assert_eq!(http.answer().status, 413, "chunked: {chunked}");
        assert!(http.try_answer().is_none(), "the connection ends");
    }
    until("both are counted", || limits(broker, "Body") >= before + 2.0);
    others_are_served(broker);
}

#[test]
fn promise_7_who_sends_a_refused_body_slowly_sees_the_answer_and_no_reset() {
    let mut http = Http::connect(&shared().address("http"));
    http.write(head(&format!("Content-Length: {}\r\n", 5 * MIB)).as_bytes());
    // Refused at its head, and longer on its way than a broker waits for one that has stopped.
    for _ in 0..16 {
        http.write(&vec![b' '; 5 * MIB / 16]);
        thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(http.answer().status, 413);
}

#[test]
fn promise_7_garbage_behind_a_request_ends_the_connection_after_its_answer() {
    let broker = shared();
    let token = check_in(broker).register(broker, APP, ONE.0);
    let body = json!({ "to": token }).to_string();
    for garbage in [&b"\0\x01\x02\xff\r\n\r\n"[..], b"NONSENSE\r\n\r\n", &[b'A'; 100_000], b"GET / HTTP/9.9\r\n\r\n"] {
        let mut http = Http::connect(&broker.address("http"));
        let request = format!("{}{body}", head(&format!("Content-Length: {}\r\n", body.len())));
        let _ = http.try_write(&[request.as_bytes(), garbage].concat());
        accepted(&http.answer());
        let refused = http.try_answer();
        assert!(refused.as_ref().is_none_or(|answer| (400..500).contains(&answer.status)), "{refused:?}");
        assert!(http.try_answer().is_none(), "the connection ends");
    }
    // Two lengths, a length with chunks, and an obsolete fold: another server on the way may read them otherwise.
    for further in [
        "Content-Length: 2\r\nContent-Length: 3\r\n",
        "Content-Length: -1\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "X: y\r\n z\r\nContent-Length: 2\r\n",
    ] {
        let mut http = Http::connect(&broker.address("http"));
        http.write(format!("{}{{}}", head(further)).as_bytes());
        let refused = http.try_answer();
        assert!(refused.as_ref().is_none_or(|answer| answer.status == 400), "{further}: {refused:?}");
    }
    others_are_served(broker);
}

#[test]
fn promise_7_many_small_values_are_refused_in_json_and_bounded_in_forms_without_much_memory() {
    let broker = Broker::start();
    let address = broker.address("http");
    others_are_served(&broker);
    let before = broker.resident_bytes();
    let inner = 4 * MIB - 64;
    let bodies = [
        format!("{{\"data\":[{}0]}}", "0,".repeat(inner / 2)),
        format!("{{\"registration_ids\":[{}\"\"]}}", "\"\",".repeat(inner / 3)),
        format!("{{\"data\":{{{}\"a\":0}}}}", "\"a\":0,".repeat(inner / 6)),
        format!("{{\"x\":{}", "{\"a\":".repeat(inner / 5)),
        "[".repeat(inner),
    ];
    let key = format!("key={}", ONE.1);
    let json_type = [("Authorization", key.as_str()), ("Content-Type", "application/json")];
    for body in &bodies {
        let answer = Http::connect(&address).request("POST", "/gcm/send", &json_type, body.as_bytes());
        assert_eq!(answer.status, 400, "{}", &body[..20]);
    }
    for form in ["a&".repeat(inner / 2), "data.a=&".repeat(inner / 8), "registration_id=x&".repeat(inner / 18)] {
        let answer = send_form(&address, ONE.1, &form);
        assert!([200, 400].contains(&answer.status), "{}", answer.status);
    }
    let grown = broker.resident_bytes().saturating_sub(before);
    assert!(grown < 64 * MIB as u64, "{} MiB", grown >> 20);
    others_are_served(&broker);
}

// ------------------------------------------------------------------------------------------- HTTP: many connections

#[test]
fn promise_8_past_connections_max_clients_wait_on_every_address_until_a_slot_is_free() {
    let broker = broker_with("[http]\nconnections_max = 2\n");
    let address = broker.address("http");
    others_are_served(&broker);
    until("the slots are free", || broker.metric("martlet_gateway_http_connections ") == 0.0);
    // Served: a request on each, kept alive.
    let mut kept: Vec<_> = (0..2).map(|_| Http::connect(&address)).collect();
    for http in &mut kept {
        assert_eq!(http.request("POST", "/nothing", &[], b"").status, 404);
    }
    let waiting = ["plain", "plain", "tls"].map(|kind| {
        let (address, ca) = (address.clone(), martlet_loadtest::device::trusting(&broker.ca_file()).unwrap());
        let https = broker.address("https");
        thread::spawn(move || {
            let mut http = if kind == "tls" { Http::connect_tls_to(&https, ca) } else { Http::connect(&address) };
            http.request("POST", "/nothing", &[], b"").status
        })
    });
    until("the limit is counted", || limits(&broker, "Connections") >= 2.0);
    assert!(waiting.iter().all(|thread| !thread.is_finished()), "no more than connections_max are served");
    assert_eq!(broker.metric("martlet_gateway_http_connections "), 2.0);
    drop(kept);
    for thread in waiting {
        assert_eq!(thread.join().unwrap(), 404);
    }
    others_are_served(&broker);
}

#[test]
fn with_one_slot_plain_and_tls_are_both_served() {
    let broker = broker_with("[http]\nconnections_max = 1\n");
    for _ in 0..3 {
        assert_eq!(Http::connect(&broker.address("http")).request("POST", "/nothing", &[], b"").status, 404);
        assert_eq!(Http::connect_tls(&broker).request("POST", "/nothing", &[], b"").status, 404);
    }
}

#[test]
fn promise_7_promise_8_a_flood_of_200_connections_costs_bounded_memory_and_others_are_served() {
    // On a busy machine the flood takes its time, and none of it is to be given up meanwhile: that would make room.
    let broker = broker_with("[http]\nbody_bytes_total = 33554432\nbody_timeout = \"10m\"\nheader_timeout = \"10m\"\n");
    let address = broker.address("http");
    others_are_served(&broker);
    let before = broker.resident_bytes();
    let (mut heads, mut bodies) = (Vec::new(), Vec::new());
    let part = vec![b' '; 3 * MIB];
    for _ in 0..100 {
        // A head without end, as large as is taken.
        let mut http = Http::connect(&address);
        http.write(&head("X: ").as_bytes()[..head("X: ").len() - 2]);
        let _ = http.try_write(&[b'y'; 20_000]);
        heads.push(http);
        // A body that is begun; which of them find room is a race.
        let mut socket = Http::socket(&address);
        socket.write_all(head(&format!("Content-Length: {}\r\n", 4 * MIB)).as_bytes()).unwrap();
        let _ = socket.write_all(&part);
        bodies.push(socket);
    }
    until("the limit is counted", || limits(&broker, "BodyBytesTotal") >= 1.0);
    let grown = broker.resident_bytes().saturating_sub(before);
    // The bodies, twice while they grow, the heads, the buffers.
    assert!(grown < 128 * MIB as u64, "{} MiB", grown >> 20);
    // Small requests find room, or are told when to come back; devices are served.
    let mut mcs = check_in(&broker).connect(&broker);
    mcs.write(&[0, 0]);
    assert!(matches!(mcs.stanza(), Stanza::HeartbeatAck(_)));
    for socket in &bodies {
        socket.set_nonblocking(true).unwrap();
    }
    let mut answered = None;
    until("a refused one has its answer", || {
        answered = bodies.iter().position(|socket| socket.peek(&mut [0]).is_ok_and(|read| read > 0));
        answered.is_some()
    });
    let socket = bodies.swap_remove(answered.unwrap());
    socket.set_nonblocking(false).unwrap();
    let refused = Http::over(socket).answer();
    assert_eq!(refused.status, 503);
    assert!(refused.header("retry-after").unwrap().parse::<u32>().unwrap() > 0);
    drop((heads, bodies));
    until("the connections are gone", || broker.metric("martlet_gateway_http_connections ") == 0.0);
    others_are_served(&broker);
}

#[test]
fn promise_8_devices_that_hold_all_the_room_of_devices_do_not_shut_out_app_servers() {
    let broker = broker_with("[http]\nbody_bytes_total = 8388608\n");
    let address = broker.address("http");
    let token = check_in(&broker).register(&broker, APP, ONE.0);
    let begun = "POST /checkin HTTP/1.1\r\nHost: x\r\nContent-Length: 262144\r\n\r\n";
    let hold = |bytes: usize| {
        let mut http = Http::connect(&address);
        http.write(begun.as_bytes());
        let _ = http.try_write(&vec![0; bytes]);
        http
    };
    // Large ones first, then small ones into what they leave.
    let mut flood = Vec::new();
    for (bytes, count) in [(200_000, 60), (1_000, 260)] {
        let before = limits(&broker, "BodyBytesTotal");
        flood.extend((0..count).map(|_| hold(bytes)));
        until("the limit is counted", || limits(&broker, "BodyBytesTotal") > before);
    }
    // A payload that takes some room itself.
    let data = json!({ "k": "v".repeat(4_000) });
    accepted(&send_json(&address, ONE.1, &json!({ "to": token, "data": data })));
}

// ------------------------------------------------------------------------------------------- HTTPS

#[test]
fn https_gives_the_answers_of_http() {
    let broker = shared();
    let identity = check_in(broker);
    let token = identity.register(broker, APP, ONE.0);
    let key = format!("key={}", ONE.1);
    let aid = identity.authorization();
    let json_type = ("Content-Type", "application/json");
    let send = |body: Value| ("/gcm/send", vec![("Authorization", key.as_str()), json_type], body.to_string());
    let form = format!("app={APP}&sender={}&device={}", ONE.0, identity.android_id);
    let requests = [
        send(json!({ "to": token })),
        send(json!({ "registration_ids": [token, "x"] })),
        send(json!({ "to": token, "priority": "urgent" })),
        send(json!([])),
        ("/gcm/send", vec![("Authorization", key.as_str())], format!("registration_id={token}")),
        ("/gcm/send", vec![("Authorization", key.as_str())], String::new()),
        ("/fcm/send", vec![("Authorization", "key=unknown"), json_type], "{}".to_owned()),
        ("/nothing", vec![], String::new()),
        ("/checkin", vec![], "no protobuf".to_owned()),
        ("/c2dm/register3", vec![("Authorization", aid.as_str())], form),
        ("/c2dm/register3", vec![], "app=x".to_owned()),
    ];
    let mut plain = Http::connect(&broker.address("http"));
    let mut tls = Http::connect_tls(broker);
    for (path, headers, body) in &requests {
        let [one, two] = [&mut plain, &mut tls].map(|http| http.request("POST", path, headers, body.as_bytes()));
        assert_eq!(one.status, two.status, "{path} {body}");
        let names = |answer: &Answer| answer.headers.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        assert_eq!((names(&one), one.header("content-type")), (names(&two), two.header("content-type")));
        // But for the ids, which are drawn.
        let without_ids = |answer: &Answer| {
            let text: String = String::from_utf8_lossy(&answer.body).into_owned();
            text.split(['"', ',', '=', '\n'])
                .filter(|word| !word.starts_with("0:") && !word.starts_with(":"))
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(without_ids(&one), without_ids(&two), "{path} {body}");
    }
}

// ------------------------------------------------------------------------------------------- MCS

#[test]
fn promise_7_two_hundred_half_open_handshakes_stop_nobody_and_end_at_the_timeout() {
    let broker = broker_with("[http]\nhandshake_timeout = \"2s\"\n[mcs]\nhandshake_timeout = \"2s\"\n");
    let mut half_open = Vec::new();
    for number in 0..200 {
        for listener in ["mcs", "https"] {
            let mut socket = TcpStream::connect(broker.address(listener)).unwrap();
            if number % 2 == 0 {
                // The beginning of a ClientHello.
                socket.write_all(&[0x16, 3, 1, 0x02, 0x00, 1, 0, 1, 0xfc, 3, 3]).unwrap();
            }
            half_open.push(socket);
        }
    }
    others_are_served(&broker);
    assert_eq!(Http::connect_tls(&broker).request("POST", "/nothing", &[], b"").status, 404);
    for mut socket in half_open {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut rest = Vec::new();
        // Closed or reset, not silent.
        if let Err(error) = socket.read_to_end(&mut rest) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
    }
    until("they are counted", || {
        broker.metric("martlet_gateway_mcs_handshakes_failed_total") >= 200.0 && limits(&broker, "Slow") >= 200.0
    });
    others_are_served(&broker);
}

#[test]
fn mc_07_a_connection_without_a_whole_login_is_closed_at_the_limit() {
    let broker = broker_with("[mcs]\nlogin_timeout = \"1s\"\n");
    let login = frame::encode_first(41, Tag::LoginRequest, &check_in(&broker).login_request());
    let mut silent = Mcs::open(&broker);
    silent.write(&[]);
    let mut begun = Mcs::open(&broker);
    begun.write(&login[..20]);
    let mut dripping = Mcs::open(&broker);
    let mut bytes = login[..login.len() - 1].iter().cycle();
    let started = Instant::now();
    dripping.write(&[*bytes.next().unwrap()]);
    while dripping.try_write(&[*bytes.next().unwrap()]).is_ok() && started.elapsed() < Duration::from_secs(4) {
        thread::sleep(Duration::from_millis(100));
    }
    for mut late in [silent, begun, dripping] {
        let said = late.closed(PATIENCE);
        assert!(!said.iter().any(|stanza| matches!(stanza, Stanza::LoginResponse(r) if r.error.is_none())), "{said:?}");
    }
    until("they are counted", || broker.metric("martlet_gateway_mcs_logins_missing_total") >= 2.0);
    others_are_served(&broker);
}

#[test]
fn promise_7_an_oversize_login_and_an_endless_size_are_closed_without_memory() {
    let broker = Broker::start();
    let identity = check_in(&broker);
    others_are_served(&broker);
    let before = broker.resident_bytes();
    let setting = vec![Setting { name: "x".to_owned(), value: "y".repeat(80_000) }];
    let oversize = frame::encode_first(41, Tag::LoginRequest, &LoginRequest { setting, ..identity.login_request() });
    let endless = [&[41, 2][..], &[0xff; 10_000]].concat();
    let huge = [&[41, 2, 0xff, 0xff, 0xff, 0xff, 0x07][..], &[0; 100_000]].concat();
    for bytes in [&oversize[..], &endless, &huge] {
        let hostile: Vec<_> = (0..20)
            .map(|_| {
                let mut mcs = Mcs::open(&broker);
                let _ = mcs.try_write(bytes);
                mcs
            })
            .collect();
        for mut mcs in hostile {
            let said = mcs.closed(PATIENCE);
            let welcome = |stanza: &Stanza| matches!(stanza, Stanza::LoginResponse(r) if r.error.is_none());
            assert!(!said.iter().any(welcome), "{said:?}");
        }
    }
    let grown = broker.resident_bytes().saturating_sub(before);
    assert!(grown < 32 * MIB as u64, "{} MiB", grown >> 20);
    others_are_served(&broker);
}

#[test]
fn promise_8_past_connections_max_devices_wait_until_a_slot_is_free() {
    let broker = broker_with("[mcs]\nconnections_max = 1\n");
    let (first, second) = (check_in(&broker), check_in(&broker));
    let token = second.register(&broker, APP, ONE.0);
    let mut mcs = first.connect(&broker);
    mcs.write(&[0, 0]);
    assert!(matches!(mcs.stanza(), Stanza::HeartbeatAck(_)));
    accepted(&send_json(&broker.address("http"), ONE.1, &json!({ "to": token, "data": { "k": "v" } })));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| value(&second.connect(&broker).message(), "k").map(ToOwned::to_owned));
        until("it is counted", || broker.metric("martlet_gateway_mcs_slots_awaited_total") >= 1.0);
        assert!(!waiting.is_finished());
        drop(mcs);
        assert_eq!(waiting.join().unwrap().as_deref(), Some("v"));
    });
}
