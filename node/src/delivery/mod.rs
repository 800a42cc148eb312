//! Delivery to attached devices: memory of the leader only.
