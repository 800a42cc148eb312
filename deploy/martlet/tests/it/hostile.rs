//! Peers that mean harm, limits that are reached, ends and revocations: on the built executable. Whatever one client does, it
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
    broker::{Broker, ONE, TWO, martlet, shared, text},
    device::{Mcs, PATIENCE, check_in, value},
};

const APP: &str = "com.example.app";
const MIB: usize = 1 << 20;
/// Two Instance IDs.
const IIDS: [&str; 2] = ["eAbCdEfGhIj", "fAbCdEfGhIj"];

/// A broker with this configuration.
fn broker_with(config: &str) -> Broker {
    // Read once, before the broker is ready.
    Broker::start_with(&["--config", text(config_file(config).path())])
}

/// A file with this configuration, for a broker that is started more than once.
fn config_file(config: &str) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), config).unwrap();
    file
}

/// The head of a send with these further lines, each with its end.
fn head(further: &str) -> String {
    format!(
        "POST /gcm/send HTTP/1.1\r\nHost: x\r\nAuthorization: key={}\r\nContent-Type: application/json\r\n{further}\r\n",
        ONE.1
    )
}

/// Asserts that a new device can enrol, connect and be reached, and that nothing has panicked.
fn others_are_served(broker: &Broker) {
    let identity = check_in(broker);
    let token = identity.register(broker, APP, ONE.0);
    let mut mcs = identity.connect(broker);
    accepted(&send_json(&broker.address("http"), ONE.1, &json!({ "to": token, "data": { "k": "v" } })));
    assert_eq!(value(&mcs.message(), "k"), Some("v"));
    let log = broker.log_text();
    assert!(!log.contains("panicked at"), "{log}");
}

/// Asserts one result with a message id.
fn accepted(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.text());
    let json = answer.json();
    json["results"][0]["message_id"].as_str().unwrap_or_else(|| panic!("{json}")).to_owned()
}

fn result_of(broker: &Broker, key: &str, token: &str) -> Value {
    let answer = send_json(&broker.address("http"), key, &json!({ "to": token }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["results"][0].clone()
}

fn limits(broker: &Broker, limit: &str) -> f64 {
    broker.metric(&format!("martlet_gateway_limits_reached_total{{limit=\"{limit}\"}}"))
}

/// Waits until `what` holds.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
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

// ------------------------------------------------------------------------------------------- drain

#[test]
fn sigterm_answers_the_send_in_flight_says_close_to_devices_and_loses_nothing() {
    let config = config_file("[http]\nhandshake_timeout = \"1h\"\n[mcs]\nhandshake_timeout = \"1h\"\n");
    let mut broker = Broker::start_with(&["--config", text(config.path())]);
    let address = broker.address("http");
    let (here, away) = (check_in(&broker), check_in(&broker));
    let (token_here, token_away) = (here.register(&broker, APP, ONE.0), away.register(&broker, APP, ONE.0));
    let mut mcs = here.connect(&broker);
    // Received, and not acknowledged.
    let unacked = accepted(&send_json(&address, ONE.1, &json!({ "to": token_here, "data": { "n": 1 } })));
    assert_eq!(mcs.message().persistent_id.as_ref(), Some(&unacked));
    // A send whose body is half there, an idle connection, handshakes that never end.
    let body = json!({ "registration_ids": [token_away, token_here], "data": { "n": 2 } }).to_string();
    let mut in_flight = Http::connect(&address);
    in_flight.write(head(&format!("Content-Length: {}\r\n", body.len())).as_bytes());
    in_flight.write(&body.as_bytes()[..10]);
    let mut idle = Http::connect(&address);
    assert_eq!(idle.request("POST", "/nothing", &[], b"").status, 404);
    let half_open = ["mcs", "https"].map(|listener| TcpStream::connect(broker.address(listener)).unwrap());
    broker.ask_to_end();
    until("it accepts no more", || TcpStream::connect(&address).is_err());
    assert!(idle.try_answer().is_none(), "an idle connection is closed");
    in_flight.write(&body.as_bytes()[10..]);
    let answer = in_flight.answer();
    assert_eq!(answer.header("connection"), Some("close"));
    let json = answer.json();
    assert_eq!(json["success"], 2, "{json}");
    assert_eq!(mcs.closed(PATIENCE).last(), Some(&Stanza::Close));
    assert!(broker.ended().success(), "{}", broker.log_text());
    assert!(!broker.log_text().contains("took too long"), "half-open handshakes held it up");
    drop(half_open);
    broker.restart();
    let ids = [0, 1].map(|at| json["results"][at]["message_id"].as_str().map(ToOwned::to_owned));
    assert_eq!(away.connect(&broker).message().persistent_id, ids[0]);
    let mut again = here.connect(&broker);
    assert_eq!(again.message().persistent_id, Some(unacked));
    assert_eq!(again.message().persistent_id, ids[1]);
}

// ------------------------------------------------------------------------------------------- operators

/// Runs `martlet admin` against a broker; whether it succeeded, and what it printed and said.
fn admin(node: &str, words: &[&str]) -> (bool, String, String) {
    let (status, out, said) = martlet(&[&["admin", "--node", node], words].concat());
    (status.success(), out, said)
}

/// The value behind `name` in lines of names and values.
fn printed<'a>(out: &'a str, name: &str) -> &'a str {
    let value = out.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    value.unwrap_or_else(|| panic!("no {name} in\n{out}"))
}

#[test]
fn a_new_key_works_and_a_revoked_one_gives_401_as_soon_as_the_command_has_returned() {
    let broker = Broker::start();
    let (http, node) = (broker.address("http"), broker.address("grpc"));
    let token = check_in(&broker).register(&broker, APP, ONE.0);
    let (done, out, said) = admin(&node, &["key", "add", ONE.0]);
    assert!(done, "{said}");
    let (key, id) = (printed(&out, "server key"), printed(&out, "key id"));
    accepted(&send_json(&http, key, &json!({ "to": token })));
    accepted(&send_json(&http, ONE.1, &json!({ "to": token })));
    let (_, shown, _) = admin(&node, &["project", "show", ONE.0]);
    assert!(!shown.contains(key) && !shown.contains(ONE.1), "keys are shown once\n{shown}");
    assert_eq!(printed(&shown, "sender id"), ONE.0);
    let (done, out, said) = admin(&node, &["key", "revoke", ONE.0, id]);
    assert!(done, "{said}");
    assert_eq!(out, "revoked: every gateway has confirmed\n");
    assert_eq!(send_json(&http, key, &json!({ "to": token })).status, 401);
    accepted(&send_json(&http, ONE.1, &json!({ "to": token })));
    let (_, shown, _) = admin(&node, &["project", "show", ONE.0]);
    let line = shown.lines().find(|line| line.contains("revoked")).unwrap_or_else(|| panic!("{shown}"));
    assert!(line.split_whitespace().any(|word| word == id), "{line}");
    // A key that is given, and one that another project has.
    let (done, out, said) = admin(&node, &["key", "add", ONE.0, "--server-key", "given-key-0123456789"]);
    assert!(done, "{said}");
    assert_eq!(printed(&out, "server key"), "given-key-0123456789");
    accepted(&send_json(&http, "given-key-0123456789", &json!({ "to": token })));
    let (done, _, said) = admin(&node, &["key", "add", TWO.0, "--server-key", "given-key-0123456789"]);
    assert!(!done && said.contains("key"), "{said}");
}

#[test]
fn projects_are_created_listed_and_shown_and_unknown_ones_are_named() {
    let broker = Broker::start();
    let (http, node) = (broker.address("http"), broker.address("grpc"));
    let (done, out, said) =
        admin(&node, &["project", "create", "--sender-id", "777", "--text-id", "my-app", "--name", "My app"]);
    assert!(done, "{said}");
    assert_eq!(printed(&out, "sender id"), "777");
    let key = printed(&out, "server key");
    let token = check_in(&broker).register(&broker, APP, "777");
    accepted(&send_json(&http, key, &json!({ "to": token })));
    let (done, out, _) = admin(&node, &["project", "create"]);
    assert!(done);
    let drawn = printed(&out, "sender id");
    assert!(drawn.len() == 12 && drawn.bytes().all(|byte| byte.is_ascii_digit()), "{drawn}");
    let (_, list, _) = admin(&node, &["project", "list"]);
    for word in [ONE.0, TWO.0, "777", drawn, "my-app", "My app", "live keys"] {
        assert!(list.contains(word), "{word} in\n{list}");
    }
    let (_, shown, _) = admin(&node, &["project", "show", "777"]);
    assert_eq!((printed(&shown, "text id"), printed(&shown, "name")), ("my-app", "My app"));
    assert!(shown.contains("live") && !shown.contains(key), "{shown}");
    let wrong: [&[&str]; 6] = [
        &["project", "show", "999"],
        &["key", "add", "999"],
        &["key", "revoke", "999", "1"],
        &["key", "revoke", "777", "99"],
        &["project", "create", "--sender-id", "777"],
        &["project", "create", "--sender-id", "abc"],
    ];
    for words in wrong {
        let (done, out, said) = admin(&node, words);
        assert!(!done && out.is_empty(), "{words:?} {out}");
        // The project or key that is meant, or what a sender id looks like.
        let named = words.iter().any(|word| said.contains(*word)) || said.contains("1 to 20 decimal digits");
        assert!(named, "{words:?}: {said}");
    }
}

#[test]
fn an_entry_that_was_applied_is_not_skipped_and_the_command_says_by_whom() {
    let broker = Broker::start();
    let node = broker.address("grpc");
    let skip = |shard: &str, index: &str, more: &[&str]| {
        let words = ["shard", "skip", shard, index, "--reason", "a test"];
        admin(&node, &[&words, more].concat())
    };
    let (done, out, said) = skip("0", "1", &[]);
    assert!(!done && out.is_empty(), "{out}");
    assert!(said.contains("entry 1 of shard 0 is not skipped") && said.contains("node 1 has applied it"), "{said}");
    let (done, _, said) = skip("9999", "1", &[]);
    assert!(!done && said.contains("there is no shard 9999"), "{said}");
    let (done, _, said) = skip("0", "1", &["--digest", "xyz"]);
    assert!(!done && said.contains("--digest xyz"), "{said}");
    let (done, out, said) = admin(&node, &["shard", "skips"]);
    assert!(done && out.contains("reason") && out.lines().count() <= 4, "{out}{said}");
    let (done, _, said) = admin(&node, &["shard", "skip", "0", "1"]);
    assert!(!done && said.contains("--reason"), "{said}");
    let (_, out, _) = admin(&node, &["cluster", "status"]);
    assert!(!out.contains("stopped: node"), "{out}");
}

#[test]
fn admin_against_a_node_that_is_down_says_which_and_what_to_do() {
    let (done, out, said) = admin("127.0.0.1:1", &["project", "list"]);
    assert!(!done && out.is_empty());
    assert!(said.contains("127.0.0.1:1") && said.contains("no node answers") && said.contains("--node"), "{said}");
    let (done, _, said) = admin("nonsense", &["project", "list"]);
    assert!(!done && said.contains("nonsense"), "{said}");
    // The first that answers is asked.
    let both = format!("127.0.0.1:1,{}", shared().address("grpc"));
    let (done, out, said) = admin(&both, &["project", "list"]);
    assert!(done && out.contains(ONE.0), "{said}");
    // An address that answers and is no node.
    let (done, _, said) = admin(&shared().address("http"), &["project", "list"]);
    assert!(!done && !said.trim().is_empty(), "{said}");
}

// ------------------------------------------------------------------------------------------- registrations

#[test]
fn rg_14_delete_token_answers_a_token_line_and_ends_that_token_only() {
    let broker = shared();
    let identity = check_in(broker);
    let form = |sender: &str, iid: &str| format!("app={APP}&sender={sender}&scope=GCM&appid={iid}");
    let token = |form: &str| identity.register_form(broker, form).text().strip_prefix("token=").unwrap().to_owned();
    let (one, two, other) = (
        token(&form(ONE.0, IIDS[0])),
        token(&form(TWO.0, IIDS[0])),
        token(&format!("app={APP}.other&sender={}&scope=GCM&appid={}", ONE.0, IIDS[1])),
    );
    let answer = identity.register_form(broker, &format!("{}&delete=true", form(ONE.0, IIDS[0])));
    assert_eq!((answer.status, answer.text()), (200, &*format!("token={}", ONE.0)));
    assert_eq!(result_of(broker, ONE.1, &one), json!({ "error": "NotRegistered" }));
    assert!(result_of(broker, TWO.1, &two)["message_id"].is_string());
    assert!(result_of(broker, ONE.1, &other)["message_id"].is_string());
    // Once more: it is gone, which is what was asked for.
    let answer = identity.register_form(broker, &format!("{}&X-delete=1", form(ONE.0, IIDS[0])));
    assert!(answer.text().starts_with("token="), "{}", answer.text());
    // A token that is gone is made anew.
    assert_ne!(token(&form(ONE.0, IIDS[0])), one);
}

#[test]
fn rg_15_delete_id_ends_every_token_of_the_instance_and_no_other() {
    let broker = shared();
    let identity = check_in(broker);
    let token = |app: &str, sender: &str, scope: &str, iid: &str| {
        let form = format!("app={app}&sender={sender}&scope={scope}&appid={iid}");
        identity.register_form(broker, &form).text().strip_prefix("token=").unwrap().to_owned()
    };
    let gone = [token(APP, ONE.0, "GCM", IIDS[0]), token(APP, TWO.0, "GCM", IIDS[0]), token(APP, ONE.0, "*", IIDS[0])];
    let kept = token("com.example.other", ONE.0, "GCM", IIDS[1]);
    let form = format!("app={APP}&sender=*&scope=*&appid={}&delete=true", IIDS[0]);
    let answer = identity.register_form(broker, &form);
    assert_eq!(answer.status, 200);
    assert!(answer.text().starts_with("token="), "{}", answer.text());
    for (key, token) in [ONE.1, TWO.1, ONE.1].into_iter().zip(&gone) {
        assert_eq!(result_of(broker, key, token), json!({ "error": "NotRegistered" }));
    }
    assert!(result_of(broker, ONE.1, &kept)["message_id"].is_string());
    // Without an instance there is nothing that could be meant.
    let answer = identity.register_form(broker, &format!("app={APP}&sender=*&scope=*&delete=true"));
    assert_eq!(answer.text(), "Error=INVALID_PARAMETERS");
}

#[test]
fn rg_21_a_token_with_a_ttl_expires() {
    let broker = shared();
    let identity = check_in(broker);
    let form = format!("app={APP}&sender={}&scope=GCM&appid={}&ttl=2", ONE.0, IIDS[0]);
    let answer = identity.register_form(broker, &form);
    let token = answer.text().strip_prefix("token=").unwrap();
    let lasting = identity.register(broker, "com.example.lasting", ONE.0);
    until("it expires", || result_of(broker, ONE.1, token) == json!({ "error": "NotRegistered" }));
    assert!(result_of(broker, ONE.1, &lasting)["message_id"].is_string());
    let again = identity.register_form(broker, &form);
    assert!(again.text().starts_with("token=") && again.text() != answer.text(), "{}", again.text());
}

#[test]
fn h081_h114_rg_22_a_send_to_the_token_of_an_old_instance_delivers_and_names_the_new_one() {
    let broker = shared();
    let identity = check_in(broker);
    let [old, new] = IIDS.map(|iid| {
        let form = format!("app={APP}&sender={}&scope=GCM&appid={iid}", ONE.0);
        identity.register_form(broker, &form).text().strip_prefix("token=").unwrap().to_owned()
    });
    assert_ne!(old, new);
    let body = json!({ "registration_ids": [old, new], "data": { "k": "json" } });
    let json = send_json(&broker.address("http"), ONE.1, &body).json();
    assert_eq!((&json["success"], &json["canonical_ids"]), (&json!(2), &json!(1)), "{json}");
    assert_eq!(json["results"][0]["registration_id"], json!(new));
    assert!(json["results"][0]["message_id"].is_string() && json["results"][1].get("registration_id").is_none());
    let plain = send_form(&broker.address("http"), ONE.1, &format!("registration_id={old}&data.k=plain"));
    let lines: Vec<_> = plain.text().lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("id="), "{lines:?}");
    assert_eq!(lines[1], format!("registration_id={new}"));
    let mut mcs = identity.connect(broker);
    let values: Vec<_> = (0..3).map(|_| value(&mcs.message(), "k").map(ToOwned::to_owned)).collect();
    assert_eq!(values.iter().flatten().collect::<Vec<_>>(), ["json", "json", "plain"]);
}

#[test]
fn rg_20_the_rates_of_an_address_give_503_with_seconds_to_wait_and_are_counted() {
    let broker = broker_with(
        "[admit]\ncheckins_per_sec = 1\ncheckins_burst = 4\nregistrations_per_sec = 1\nregistrations_burst = 4\n",
    );
    let identity = check_in(&broker);
    let form = format!("app={APP}&sender={}", ONE.0);
    let beyond = |ask: &dyn Fn() -> Answer| (0..50).map(|_| ask()).find(|answer| answer.status != 200).unwrap();
    let refused = beyond(&|| identity.register_form(&broker, &form));
    assert_eq!((refused.status, refused.text()), (503, "Error=QUOTA_EXCEEDED"));
    let seconds = |answer: &Answer| answer.header("retry-after").unwrap().parse::<u32>().unwrap();
    assert!(seconds(&refused) > 0);
    let request = [0x22, 0, 0x70, 3];
    let refused = beyond(&|| crate::device::check_in_with(&broker, &request, &[]));
    assert_eq!(refused.status, 503);
    assert!(seconds(&refused) > 0);
    assert!(limits(&broker, "Registrations") >= 1.0 && limits(&broker, "Checkins") >= 1.0);
    // It fills again, and sends are not concerned.
    let mut token = String::new();
    until("it fills again", || {
        let answer = identity.register_form(&broker, &form);
        token = answer.text().strip_prefix("token=").unwrap_or_default().to_owned();
        answer.status == 200
    });
    accepted(&send_json(&broker.address("http"), ONE.1, &json!({ "to": token })));
}

#[test]
fn tokens_and_identities_of_another_cluster_are_invalid() {
    let (here, there) = (shared(), Broker::start());
    let foreign = check_in(&there);
    let token = foreign.register(&there, APP, ONE.0);
    assert!(result_of(&there, ONE.1, &token)["message_id"].is_string());
    assert_eq!(result_of(here, ONE.1, &token), json!({ "error": "InvalidRegistration" }));
    let plain = send_form(&here.address("http"), ONE.1, &format!("registration_id={token}"));
    assert_eq!(plain.text(), "Error=InvalidRegistration\n");
    let answer = foreign.register_form(here, &format!("app={APP}&sender={}", ONE.0));
    assert_eq!((answer.status, answer.text()), (401, "Error=AUTHENTICATION_FAILED"));
    let mut mcs = Mcs::open(here);
    mcs.write(&frame::encode_first(41, Tag::LoginRequest, &foreign.login_request()));
    let said = mcs.closed(PATIENCE);
    assert!(matches!(&said[..], [Stanza::LoginResponse(response), ..] if response.error.is_some()), "{said:?}");
}
