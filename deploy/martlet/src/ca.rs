//! The development CA of `standalone`: made once, kept in the data directory, trusted by whoever is told to.
//!
//! Owns `ca/` of the data directory: the CA's certificate and key, and the server certificate under it. The CA stays for good,
//! so that a client that trusts it goes on; the server certificate is issued again at each start, for the names of that start.
//! Private keys are created with mode 0600. Production listeners bring their own certificates (`tls` in the configuration).

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use clap::Args;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::private_file;

/// Names every development certificate is good for.
const LOCAL_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Life of the CA, days: ten years.
const CA_DAYS: u64 = 3_650;

/// Life of a server certificate, days. Apple's clients refuse more than 825, browsers more than 398.
const SERVER_DAYS: u64 = 397;

/// How far a certificate reaches into the past, days, for clients whose clock is behind.
const BEFORE_DAYS: u64 = 2;

/// Arguments of `martlet ca`.
#[derive(Debug, Args)]
pub(crate) struct CaArgs {
    /// Directory; the files go to its `ca` folder. A CA that is there is kept.
    #[arg(long, value_name = "DIR", default_value = "./martlet-data")]
    data: PathBuf,
    /// Further host names or addresses that the server certificate is good for, beside localhost and 127.0.0.1.
    #[arg(long, value_name = "NAME")]
    cert_name: Vec<String>,
}

/// Runs `martlet ca`.
///
/// # Errors
/// As [`open`].
#[expect(clippy::print_stdout, reason = "where the files are is what the command tells")]
pub(crate) fn run(args: &CaArgs) -> Result<()> {
    let ca = open(&args.data, &args.cert_name)?;
    println!("trust        {}", ca.ca_file.display());
    println!("certificate  {}", ca.cert_file.display());
    println!("key          {}", ca.key_file.display());
    Ok(())
}

/// Where the certificates of a development set-up are.
#[derive(Debug, Clone)]
pub(crate) struct DevelopmentCa {
    /// The CA's certificate, PEM: what clients must trust.
    pub(crate) ca_file: PathBuf,
    /// Server certificate followed by the CA's, PEM.
    pub(crate) cert_file: PathBuf,
    /// The server certificate's key, PEM, mode 0600.
    pub(crate) key_file: PathBuf,
}

/// Opens the CA in `data`/ca, making it if it is missing, and issues a server certificate for localhost and `names`.
///
/// # Errors
/// When a file cannot be read or written, or holds something else than what was written.
pub(crate) fn open(data: &Path, names: &[String]) -> Result<DevelopmentCa> {
    let dir = data.join("ca");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let paths = DevelopmentCa {
        ca_file: dir.join("ca.pem"),
        cert_file: dir.join("server.pem"),
        key_file: dir.join("server.key"),
    };
    let ca_key_file = dir.join("ca.key");
    if !paths.ca_file.exists() {
        let key = KeyPair::generate().context("draw the key of the development CA")?;
        let cert = ca_params().self_signed(&key).context("sign the development CA")?;
        private_file::write(&ca_key_file, &key.serialize_pem())
            .with_context(|| format!("write {}", ca_key_file.display()))?;
        // The certificate comes last: where it is, the key is.
        fs::write(&paths.ca_file, cert.pem()).with_context(|| format!("write {}", paths.ca_file.display()))?;
    }
    let ca_pem = fs::read_to_string(&paths.ca_file).with_context(|| format!("read {}", paths.ca_file.display()))?;
    let ca_key_pem = fs::read_to_string(&ca_key_file).with_context(|| format!("read {}", ca_key_file.display()))?;
    let ca_key = KeyPair::from_pem(&ca_key_pem).with_context(|| format!("parse {}", ca_key_file.display()))?;
    let issuer = Issuer::new(ca_params(), ca_key);

    let key = KeyPair::generate().context("draw the key of the server certificate")?;
    let cert = server_params(names)?.signed_by(&key, &issuer).context("sign the server certificate")?;
    private_file::write(&paths.key_file, &key.serialize_pem())
        .with_context(|| format!("write {}", paths.key_file.display()))?;
    fs::write(&paths.cert_file, format!("{}{ca_pem}", cert.pem()))
        .with_context(|| format!("write {}", paths.cert_file.display()))?;
    Ok(paths)
}

fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = named("Martlet development CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_life(&mut params, CA_DAYS);
    params
}

fn server_params(names: &[String]) -> Result<CertificateParams> {
    let all: Vec<String> = LOCAL_NAMES.iter().map(ToString::to_string).chain(names.iter().cloned()).collect();
    let mut params =
        CertificateParams::new(all).context("a name of --cert-name is neither a host name nor an address")?;
    params.distinguished_name = named("Martlet development server");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    set_life(&mut params, SERVER_DAYS);
    Ok(params)
}

fn named(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

/// Good from [`BEFORE_DAYS`] ago until `days` from now.
#[expect(clippy::disallowed_methods, reason = "a certificate's dates are the one use of wall time in the executable")]
fn set_life(params: &mut CertificateParams, days: u64) {
    const DAY_SECS: u64 = 24 * 3600;
    let today = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / DAY_SECS;
    let date = |day: u64| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(day * DAY_SECS);
    params.not_before = date(today.saturating_sub(BEFORE_DAYS));
    params.not_after = date(today + days);
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_second_start_keeps_the_ca_and_issues_a_new_server_certificate() {
        let data = tempfile::tempdir().unwrap();
        let first = open(data.path(), &[]).unwrap();
        let (ca, cert) = (fs::read(&first.ca_file).unwrap(), fs::read(&first.cert_file).unwrap());
        let second = open(data.path(), &["push.example".to_owned()]).unwrap();
        assert_eq!(fs::read(&second.ca_file).unwrap(), ca);
        assert_ne!(fs::read(&second.cert_file).unwrap(), cert);
    }

    #[test]
    fn private_keys_are_readable_by_their_owner_only() {
        let data = tempfile::tempdir().unwrap();
        let ca = open(data.path(), &[]).unwrap();
        for key in [ca.key_file, data.path().join("ca/ca.key")] {
            assert_eq!(fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }
}
