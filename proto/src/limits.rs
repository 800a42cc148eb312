//! Every limit of the protocols: value, unit, source. What an operator may change is configuration, not here.

/// Largest payload of one downstream message, in bytes: keys and values of `data`, and of `notification`, in UTF-8.
/// Source: gcm-http.md section 3.3.
pub const PAYLOAD_MAX_BYTES: usize = 4096;

/// Largest payload of a message to a topic, in bytes. Source: gcm-http.md section 3.3.
pub const TOPIC_PAYLOAD_MAX_BYTES: usize = 2048;

/// Longest time to live, in seconds (4 weeks), also the one of a message that names none. Source: gcm-http.md section 6.3.
pub const TTL_MAX_SECS: u32 = 2_419_200;

/// Most registration tokens of one multicast. Source: gcm-http.md section 3.1.
pub const MULTICAST_MAX: usize = 1000;

/// Largest body of an app server's request, in bytes. Source: gcm-http.md section 3.3.
pub const BODY_MAX_BYTES: usize = 4 * 1024 * 1024;

/// Most separators (`,`, `:`, `[`, `{` outside strings) of one JSON body: a parsed value costs up to a hundred bytes for two on
/// the wire. A thousand tokens beside a full payload have about 6,000. Ours.
pub const JSON_SEPARATORS_MAX: usize = 20_000;

/// Most non-collapsible messages that wait for one registration. Source: gcm-http.md section 6.4.
pub const WAITING_MAX: u32 = 100;

/// Most distinct collapse keys that wait for one registration. Source: gcm-http.md section 6.2.
pub const COLLAPSE_KEYS_MAX: u32 = 4;

/// Most senders of one registration. Source: gcm-http.md section 6.9.
pub const SENDERS_MAX: usize = 100;

/// Most members of a device group. Source: gcm-http.md section 9.2.
pub const GROUP_MEMBERS_MAX: u32 = 20;

/// Longest name of a device group, in bytes: as a topic's name. Ours; the documents name none.
pub const GROUP_NAME_MAX_BYTES: usize = 900;

/// Largest body of a request about a device group, in bytes: as many tokens as a multicast has, twice over. Ours.
pub const GROUP_BODY_MAX_BYTES: usize = 512 * 1024;

/// Longest persistent id, in characters: go-fcm-receiver writes a broken login size beyond. Source: device.md section 6.
pub const PERSISTENT_ID_MAX: usize = 40;

/// Longest registration token that is looked at, in characters: `IID:APA91b` and 134 more. Source: device.md section 4.
pub const TOKEN_MAX: usize = 22 + 1 + 6 + 134;

/// Longest application id, in bytes. Source: device.md section 3.4.
pub const APPLICATION_MAX_BYTES: usize = 255;

/// Longest subtype, in bytes: it holds a web origin. Ours.
pub const SUBTYPE_MAX_BYTES: usize = 1024;

/// Longest certificate, version or similar fact of a registration, in bytes. Ours.
pub const REGISTRATION_FACT_MAX_BYTES: usize = 255;

/// Longest collapse key, in bytes: it must leave a stanza below the cap of clients. Ours; the documents name none.
pub const COLLAPSE_KEY_MAX_BYTES: usize = 1024;

/// Largest form of a device, in bytes. Ours; Android's forms stay below 4 KiB.
pub const FORM_MAX_BYTES: usize = 32 * 1024;

/// Largest check-in body, in bytes, as sent and as unpacked: a handset's event log is the largest part. Ours.
pub const CHECKIN_MAX_BYTES: usize = 256 * 1024;

/// Largest body of a Firebase installation, in bytes. Ours; real ones stay below 1 KiB.
pub const INSTALLATION_MAX_BYTES: usize = 16 * 1024;

/// Largest frame a client may send before its login is accepted, in bytes: the list of received ids can be long.
/// Source: device.md section 6.
pub const MCS_LOGIN_MAX_BYTES: usize = 64 * 1024;

/// Largest frame a client may send after its login, in bytes. Source: device.md section 6.
pub const MCS_FRAME_MAX_BYTES: usize = 16 * 1024;

/// Largest frame a client of ours takes from a server, in bytes: a full payload with all its envelopes, several times over. Ours.
pub const MCS_SERVER_FRAME_MAX_BYTES: usize = 64 * 1024;

/// Most received persistent ids of one login: more than a device can have waiting, and what fits the login cap anyway. Ours.
pub const MCS_RECEIVED_IDS_MAX: usize = 2000;

/// The MCS version this broker answers with. Source: device.md section 6.
pub const MCS_VERSION: u8 = 41;

/// The oldest MCS version of a client that is served. Source: device.md section 6.
pub const MCS_VERSION_MIN: u8 = 38;

/// Life of an installation token, in seconds (7 days). Source: device.md section 5.1.
pub const INSTALLATION_TOKEN_LIFE_SECS: u64 = 604_800;

/// Largest batch of operations that a shard's leader takes, in bytes: it goes into one entry of the log. Ours.
pub const BATCH_BYTES_MAX: usize = 2 << 20;

/// Most operations of one batch. Ours.
pub const BATCH_OPERATIONS_MAX: usize = 4_096;

/// Bytes of acks of one shard that wait at its leader; one set that is larger would be refused each time. Ours.
pub const ACKS_BYTES_MAX: usize = 1 << 20;

/// Most sequences and message ids of one `Ack`, 18 bytes each: a seventh of [`ACKS_BYTES_MAX`], so that several devices' fit. Ours.
pub const ACK_IDS_MAX: usize = 8_192;

/// Most attaches of one `AttachBatch`, each below 100 bytes. Ours.
pub const ATTACH_BATCH_MAX: usize = 4_096;

/// Largest message that either side of gRPC between gateways and nodes takes unless it says otherwise, in bytes: tonic's default.
/// Requests and replies of the service `Queue` stay below it by construction. Source: tonic, `DEFAULT_MAX_RECV_MESSAGE_SIZE`.
pub const GRPC_MESSAGE_MAX_BYTES: usize = 4 << 20;

/// Largest meta state that nodes send and gateways and operators take, in bytes: every project, key, shard and skip that a cluster may
/// have fits. Ours.
pub const META_STATE_MAX_BYTES: usize = 64 << 20;

/// Longest name of a topic, in bytes, without `/topics/`. Source: gcm-http.md section 8.1.
pub const TOPIC_NAME_MAX_BYTES: usize = 900;

/// Most topics of one condition. Source: gcm-http.md section 8.3.
pub const CONDITION_TOPICS_MAX: usize = 5;

/// Longest condition, in bytes: five of the longest names and what stands between them. Ours.
pub const CONDITION_MAX_BYTES: usize = 8 * 1024;

/// Most tokens of one `batchAdd` or `batchRemove`. Source: gcm-http.md section 10.4.
pub const SUBSCRIBE_BATCH_MAX: usize = 1000;

/// Most topics of one registration. Source: gcm-http.md section 8.2.
pub const TOPICS_OF_REGISTRATION_MAX: u32 = 2000;
