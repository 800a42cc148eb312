//! Where openraft begins and ends: no other module names its types.
