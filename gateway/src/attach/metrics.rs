//! The instruments of attachments: name, unit and meaning together.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// What became of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Fate {
    /// Queued for its connection.
    Placed,
    /// Handed back: its connection is gone.
    Returned,
    /// Written to the device.
    Written,
    /// Written before on the same connection.
    Duplicate,
    /// From a leader that was replaced.
    Void,
    /// Its time to live ended before it could be written.
    Expired,
    /// Cannot be shown to a device.
    Malformed,
}

/// Label of deliveries.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FateLabel {
    /// What became of it.
    pub fate: Fate,
}

/// All instruments of attachments.
#[derive(Debug, Default)]
pub struct AttachMetrics {
    /// Attachments of connections, attached or on their way.
    pub attachments: Gauge,
    /// Pairs of streams to nodes that are open.
    pub links: Gauge,
    /// Pairs of streams that were lost.
    pub links_lost: Counter,
    /// Attaches asked for, re-attaches included.
    pub asks: Counter,
    /// Attachments taken over by a newer connection.
    pub superseded: Counter,
    /// Sets of acks handed to nodes.
    pub acks: Counter,
    /// Deliveries by what became of them.
    pub deliveries: Family<FateLabel, Counter>,
}

impl AttachMetrics {
    /// Adds every instrument to `registry`, all under `martlet_gateway_attach_`.
    pub fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("martlet_gateway_attach");
        r.register("attachments", "Attachments of device connections", self.attachments.clone());
        r.register("links", "Pairs of streams to nodes that are open", self.links.clone());
        r.register("links_lost", "Pairs of streams to nodes that were lost", self.links_lost.clone());
        r.register("asks", "Attaches asked for, re-attaches included", self.asks.clone());
        r.register("superseded", "Attachments taken over by a newer connection", self.superseded.clone());
        r.register("acks", "Sets of acks handed to nodes", self.acks.clone());
        r.register("deliveries", "Deliveries by what became of them", self.deliveries.clone());
    }

    pub(crate) fn fate(&self, fate: Fate) {
        self.deliveries.get_or_create(&FateLabel { fate }).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instrument_is_registered_under_its_prefix() {
        let mut registry = Registry::default();
        AttachMetrics::default().register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(
            text.lines().filter(|line| line.starts_with("# HELP")).all(|line| line.contains("martlet_gateway_attach_")),
            "{text}"
        );
    }
}
