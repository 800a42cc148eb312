//! Where the gateway's random values come from: ids, keys of nothing, jitter.
//!
//! Owns one cryptographic generator, seeded by the system; tests seed it by number. Android ids and registration ids are drawn
//! from it, so it must never be a fast and guessable one.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
};

use rand::{SeedableRng, rngs::StdRng};

/// A cryptographic generator shared by all requests.
pub struct Entropy(Mutex<StdRng>);

impl Entropy {
    /// Seeded by the system.
    pub fn system() -> Self {
        Self(Mutex::new(StdRng::from_os_rng()))
    }

    /// Seeded by number: for tests only.
    pub fn seeded(seed: u64) -> Self {
        Self(Mutex::new(StdRng::seed_from_u64(seed)))
    }

    /// Draws something.
    pub fn draw<T>(&self, with: impl FnOnce(&mut StdRng) -> T) -> T {
        // A panic while drawing leaves a generator that is as random as before.
        with(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Entropy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Entropy(..)")
    }
}
