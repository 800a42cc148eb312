//! Compiles the .proto files with protox, so that building needs no protoc.

use std::{env, error::Error, path::PathBuf};

const CLUSTER: [&str; 5] = ["queue.proto", "command.proto", "meta.proto", "admin.proto", "raft.proto"];
const DEVICE: [&str; 2] = ["mcs.proto", "checkin.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    for (folder, files) in [("cluster", &CLUSTER[..]), ("device", &DEVICE[..])] {
        let folder = root.join(folder);
        println!("cargo::rerun-if-changed={}", folder.display());
        let descriptors = protox::compile(files, [&folder])?;
        tonic_prost_build::configure().bytes(".").build_server(true).build_client(true).compile_fds(descriptors)?;
    }
    Ok(())
}
