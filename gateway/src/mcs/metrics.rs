//! The instruments of the MCS listener: name, unit and meaning together.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::{login::RejectReason, session::CloseReason};

/// Label of rejected logins.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RejectLabel {
    /// Why.
    pub reason: RejectReason,
}

/// Label of ended sessions.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CloseLabel {
    /// Why.
    pub reason: CloseReason,
}

/// All instruments of MCS.
#[derive(Debug, Default)]
pub struct McsMetrics {
    /// Sockets that are open, logged in or not.
    pub connections: Gauge,
    /// Devices that are logged in.
    pub sessions: Gauge,
    /// Sockets closed at once, because their address comes too often.
    pub turned_away: Counter,
    /// TLS handshakes that failed or took too long.
    pub handshakes_failed: Counter,
    /// Connections that ended before a first frame came, by the device or by time.
    pub logins_missing: Counter,
    /// Logins accepted.
    pub logins: Counter,
    /// Logins rejected, by reason.
    pub logins_rejected: Family<RejectLabel, Counter>,
    /// Logins answered although the acks in them were not confirmed in time.
    pub logins_unconfirmed: Counter,
    /// Sessions ended, by reason; a lost socket has none.
    pub closes: Family<CloseLabel, Counter>,
    /// Sessions whose socket ended without Close, or took no more bytes.
    pub lost: Counter,
    /// Frames read from devices.
    pub frames_read: Counter,
    /// Frames written to devices.
    pub frames_written: Counter,
    /// Messages that fell out of a full window unacknowledged; they stay stored.
    pub unacked_forgotten: Counter,
    /// Connections that waited for a slot, because `mcs.connections_max` was reached.
    pub slots_awaited: Counter,
    /// Accepts that failed, for want of descriptors most likely.
    pub accepts_failed: Counter,
}

impl McsMetrics {
    /// Adds every instrument to `registry`, all under `martlet_gateway_mcs_`.
    pub fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("martlet_gateway_mcs");
        r.register("connections", "MCS sockets that are open", self.connections.clone());
        r.register("sessions", "Devices that are logged in", self.sessions.clone());
        r.register("turned_away", "Sockets closed at once by the limits of their address", self.turned_away.clone());
        r.register("handshakes_failed", "TLS handshakes that failed", self.handshakes_failed.clone());
        r.register("logins_missing", "Connections that ended before a login came", self.logins_missing.clone());
        r.register("logins", "Logins accepted", self.logins.clone());
        r.register("logins_rejected", "Logins rejected", self.logins_rejected.clone());
        r.register(
            "logins_unconfirmed",
            "Logins answered before the acks in them were confirmed",
            self.logins_unconfirmed.clone(),
        );
        r.register("closes", "Sessions ended", self.closes.clone());
        r.register("lost", "Sessions whose socket ended without Close", self.lost.clone());
        r.register("frames_read", "Frames read from devices", self.frames_read.clone());
        r.register("frames_written", "Frames written to devices", self.frames_written.clone());
        r.register(
            "unacked_forgotten",
            "Messages that fell out of a full window unacknowledged",
            self.unacked_forgotten.clone(),
        );
        r.register("slots_awaited", "Connections that waited for a slot", self.slots_awaited.clone());
        r.register("accepts_failed", "Accepts that failed", self.accepts_failed.clone());
    }

    pub(crate) fn rejected(&self, reason: RejectReason) {
        self.logins_rejected.get_or_create(&RejectLabel { reason }).inc();
    }

    pub(crate) fn closed(&self, reason: CloseReason) {
        self.closes.get_or_create(&CloseLabel { reason }).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instrument_is_registered_under_its_prefix() {
        let mut registry = Registry::default();
        McsMetrics::default().register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(
            text.lines().filter(|line| line.starts_with("# HELP")).all(|line| line.contains("martlet_gateway_mcs_")),
            "{text}"
        );
    }
}
