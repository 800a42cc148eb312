//! A Martlet gateway: it ends the connections of app servers and devices, routes by token, and holds nothing that matters.

pub mod clock;
