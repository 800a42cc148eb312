//! The form of register3: read, told apart, and answered. Source: device.md section 3.
//!
//! Owns which fields make which operation, and the errors with their status. Whether a sender exists is the gateway's to ask,
//! whether a registration does, the shard's. The invariant: an answer has no line feed, and no token holds `=`.

use std::collections::BTreeMap;

use crate::{
    limits::{
        APPLICATION_MAX_BYTES, REGISTRATION_FACT_MAX_BYTES, SENDERS_MAX, SUBTYPE_MAX_BYTES, TOKEN_MAX,
        TOPIC_NAME_MAX_BYTES,
    },
    message::SenderId,
    token::Iid,
    topic,
};

/// What a form asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegisterOp {
    /// A token: legacy (several senders, no scope) or by Instance ID.
    Register(Registration),
    /// The end of every registration of an application; answered by [`deleted`].
    DeleteApplication {
        /// Which.
        application: String,
    },
    /// The end of one token; answered by [`token`] with the sender.
    DeleteToken {
        /// Of the application.
        application: String,
        /// Its instance; none: the one that was invented for it.
        iid: Option<Iid>,
        /// Its sender.
        sender: SenderId,
        /// Its scope.
        scope: String,
        /// Its subtype, or empty.
        subtype: String,
    },
    /// A token joins a topic; answered by [`token`] with that token.
    Subscribe(Subscription),
    /// A token leaves a topic; answered likewise.
    Unsubscribe(Subscription),
    /// The end of every token of an instance; answered by [`token`] with the application.
    DeleteInstance {
        /// Of the application.
        application: String,
        /// Which.
        iid: Iid,
    },
}

/// A token and a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    /// Application id of the form.
    pub application: String,
    /// As it was spelled; not verified.
    pub token: String,
    /// Without `/topics/`.
    pub topic: String,
}

/// A registration that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// Application id, 1 to 255 bytes.
    pub application: String,
    /// Second-level application id, or empty.
    pub subtype: String,
    /// `GCM`, `*`, or empty in the legacy form.
    pub scope: String,
    /// Sorted, without repeats; one, except in the legacy form.
    pub senders: Vec<SenderId>,
    /// The instance, where the client named one.
    pub iid: Option<Iid>,
    /// Digest of the signing certificate, or empty.
    pub cert: String,
    /// Version of the application, or empty.
    pub app_version: String,
    /// Wished life in seconds; 0: without end.
    pub ttl_secs: u64,
}

/// Why a form is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum RegisterError {
    /// The identity is missing or wrong.
    #[error("AUTHENTICATION_FAILED")]
    AuthenticationFailed,
    /// The form names another device.
    #[error("PHONE_REGISTRATION_ERROR")]
    PhoneRegistrationError,
    /// A field is missing, malformed or contradicts another.
    #[error("INVALID_PARAMETERS")]
    InvalidParameters,
    /// A sender is unknown.
    #[error("INVALID_SENDER")]
    InvalidSender,
    /// The device has all the registrations it may have.
    #[error("TOO_MANY_REGISTRATIONS")]
    TooManyRegistrations,
    /// The registration has all the topics it may have.
    #[error("TOO_MANY_SUBSCRIBERS")]
    TooManySubscribers,
    /// Too many requests.
    #[error("QUOTA_EXCEEDED")]
    QuotaExceeded,
    /// Try again later.
    #[error("SERVICE_NOT_AVAILABLE")]
    ServiceNotAvailable,
    /// It failed inside.
    #[error("InternalServerError")]
    InternalServerError,
}

impl RegisterError {
    /// Every variant, for tests that walk a table.
    pub const ALL: [Self; 9] = [
        Self::AuthenticationFailed,
        Self::PhoneRegistrationError,
        Self::InvalidParameters,
        Self::InvalidSender,
        Self::TooManyRegistrations,
        Self::TooManySubscribers,
        Self::QuotaExceeded,
        Self::ServiceNotAvailable,
        Self::InternalServerError,
    ];

    /// The body: `Error=` and the word.
    pub fn body(self) -> String {
        format!("Error={self}")
    }

    /// The status that goes with it. `handset`: the `User-Agent` begins with `Android-GCM/`; such clients read `Error=` only
    /// from a status other than 200, all others retry such a status for ever (decisions.md, "RG-05 status").
    pub fn status(self, handset: bool) -> u16 {
        match self {
            Self::AuthenticationFailed => 401,
            Self::PhoneRegistrationError
            | Self::InvalidParameters
            | Self::InvalidSender
            | Self::TooManyRegistrations
            | Self::TooManySubscribers => {
                if handset {
                    400
                } else {
                    200
                }
            }
            Self::QuotaExceeded | Self::ServiceNotAvailable => 503,
            Self::InternalServerError => 500,
        }
    }
}

/// Whether a `User-Agent` is a handset's.
pub fn is_handset(user_agent: &str) -> bool {
    user_agent.starts_with("Android-GCM/")
}

/// Success with a token (or what stands for one on a delete).
pub fn token(value: &str) -> String {
    format!("token={value}")
}

/// Success of a legacy delete.
pub fn deleted(application: &str) -> String {
    format!("deleted={application}")
}

/// A form, read but not judged: the device must be authenticated first (section 3.4).
#[derive(Debug, Clone)]
pub struct RegisterForm(BTreeMap<String, String>);

impl RegisterForm {
    /// Reads a body. Any field may be bare or begin with `X-`; the bare one counts, of a repeated one the first.
    pub fn parse(body: &[u8]) -> Self {
        let mut fields = BTreeMap::new();
        for (name, value) in form_urlencoded::parse(body) {
            fields.entry(name.into_owned()).or_insert_with(|| value.into_owned());
        }
        Self(fields)
    }

    /// The device that the form names, in decimal; empty when it names none.
    pub fn device(&self) -> &str {
        self.field("device")
    }

    /// What the form asks for.
    ///
    /// # Errors
    /// [`RegisterError::InvalidParameters`] for the form, [`RegisterError::InvalidSender`] for a sender's spelling.
    pub fn operation(&self) -> Result<RegisterOp, RegisterError> {
        let application = self.bounded("app", APPLICATION_MAX_BYTES)?;
        if application.is_empty() {
            return Err(RegisterError::InvalidParameters);
        }
        let scope = self.bounded("scope", topic::PREFIX.len() + TOPIC_NAME_MAX_BYTES)?;
        let subtype = self.bounded("subtype", SUBTYPE_MAX_BYTES)?;
        let iid = self.iid()?;
        let ends = matches!(self.field("delete"), "1" | "true");
        if let Some(topic) = self.topic(&scope)? {
            // Who subscribes is a token, not a sender.
            let token = self.bounded("sender", TOKEN_MAX)?;
            let subscription = Subscription { application, token, topic };
            return Ok(if ends { RegisterOp::Unsubscribe(subscription) } else { RegisterOp::Subscribe(subscription) });
        }
        if scope.len() > APPLICATION_MAX_BYTES {
            return Err(RegisterError::InvalidParameters);
        }
        if ends {
            return self.delete(application, scope, subtype, iid);
        }
        let senders = self.senders()?;
        if !(scope.is_empty() && iid.is_none()) && senders.len() > 1 {
            return Err(RegisterError::InvalidParameters);
        }
        Ok(RegisterOp::Register(Registration {
            application,
            subtype,
            scope,
            senders,
            iid,
            cert: self.bounded("cert", REGISTRATION_FACT_MAX_BYTES)?,
            app_version: self.bounded("app_ver", REGISTRATION_FACT_MAX_BYTES)?,
            ttl_secs: self.ttl()?,
        }))
    }

    /// The name of the topic that the form is about. Clients name it once or twice: then both must be the same.
    fn topic(&self, scope: &str) -> Result<Option<String>, RegisterError> {
        let spelled = self.field("gcm.topic");
        let spelled = match (scope.starts_with(topic::PREFIX), spelled.is_empty()) {
            (false, true) => return Ok(None),
            (true, true) => scope,
            (false, false) => spelled,
            (true, false) if scope == spelled => scope,
            (true, false) => return Err(RegisterError::InvalidParameters),
        };
        let name = spelled.strip_prefix(topic::PREFIX).filter(|name| topic::is_name(name));
        name.map(|name| Some(name.to_owned())).ok_or(RegisterError::InvalidParameters)
    }

    fn delete(
        &self,
        application: String,
        scope: String,
        subtype: String,
        iid: Option<Iid>,
    ) -> Result<RegisterOp, RegisterError> {
        if scope.is_empty() && iid.is_none() {
            return Ok(RegisterOp::DeleteApplication { application });
        }
        if self.field("sender") == "*" {
            let iid = iid.ok_or(RegisterError::InvalidParameters)?;
            return Ok(RegisterOp::DeleteInstance { application, iid });
        }
        match <[SenderId; 1]>::try_from(self.senders()?) {
            Ok([sender]) => Ok(RegisterOp::DeleteToken { application, iid, sender, scope, subtype }),
            Err(_) => Err(RegisterError::InvalidParameters),
        }
    }

    fn senders(&self) -> Result<Vec<SenderId>, RegisterError> {
        let text = match self.field("sender") {
            "" => self.field("legacy.sender"),
            text => text,
        };
        if text.is_empty() || text.split(',').count() > SENDERS_MAX {
            return Err(RegisterError::InvalidParameters);
        }
        let parsed = text.split(',').map(|sender| SenderId::parse(sender.trim()));
        let mut senders = parsed.collect::<Result<Vec<_>, _>>().map_err(|_| RegisterError::InvalidSender)?;
        senders.sort();
        senders.dedup();
        Ok(senders)
    }

    fn iid(&self) -> Result<Option<Iid>, RegisterError> {
        let text = ["appid", "appId", "X-appid", "X-appId"].into_iter().find_map(|name| self.0.get(name));
        match text.filter(|text| !text.is_empty()) {
            None => Ok(None),
            Some(text) => Iid::parse(text).map(Some).map_err(|_| RegisterError::InvalidParameters),
        }
    }

    fn ttl(&self) -> Result<u64, RegisterError> {
        match self.field("ttl") {
            "" => Ok(0),
            text => text.parse().map_err(|_| RegisterError::InvalidParameters),
        }
    }

    fn bounded(&self, name: &str, bytes_max: usize) -> Result<String, RegisterError> {
        let value = self.field(name);
        if value.len() > bytes_max { Err(RegisterError::InvalidParameters) } else { Ok(value.to_owned()) }
    }

    /// A field in either spelling; empty when absent.
    fn field(&self, name: &str) -> &str {
        let prefixed = || self.0.get(&format!("X-{name}"));
        self.0.get(name).filter(|value| !value.is_empty()).or_else(prefixed).map_or("", String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn operation(form: &str) -> Result<RegisterOp, RegisterError> {
        RegisterForm::parse(form.as_bytes()).operation()
    }

    fn registration(form: &str) -> Registration {
        match operation(form) {
            Ok(RegisterOp::Register(registration)) => registration,
            other => panic!("{form}: {other:?}"),
        }
    }

    fn texts(senders: &[SenderId]) -> Vec<&str> {
        senders.iter().map(SenderId::as_str).collect()
    }

    #[test]
    fn rg_04_core_app_and_sender_are_required() {
        for form in ["", "app=a", "sender=1", "app=&sender=1", "app=a&sender="] {
            assert_eq!(operation(form), Err(RegisterError::InvalidParameters), "{form}");
        }
        assert_eq!(operation(&format!("app={}&sender=1", "a".repeat(256))), Err(RegisterError::InvalidParameters));
        assert_eq!(operation("app=a&sender=x"), Err(RegisterError::InvalidSender));
    }

    #[test]
    fn rg_11_core_the_legacy_form_has_several_senders_sorted_and_once() {
        let registration = registration("app=a&sender=20,3,20");
        assert_eq!(texts(&registration.senders), ["20", "3"]);
        assert_eq!((registration.scope.as_str(), registration.iid), ("", None));
        let many = (0..101).map(|n| n.to_string()).collect::<Vec<_>>().join(",");
        assert_eq!(operation(&format!("app=a&sender={many}")), Err(RegisterError::InvalidParameters));
        assert_eq!(operation("app=a&sender=1,2&scope=GCM"), Err(RegisterError::InvalidParameters));
    }

    #[test]
    fn rg_12_core_bare_and_prefixed_spellings_are_equal() {
        let bare = registration("app=a&sender=1&scope=GCM&subtype=s&appid=eAbCdEfGhIj&app_ver=7&cert=c");
        let prefixed = registration("app=a&sender=1&X-scope=GCM&X-subtype=s&X-appid=eAbCdEfGhIj&X-app_ver=7&X-cert=c");
        assert_eq!(bare, prefixed);
        assert_eq!(operation("app=a&X-delete=1"), operation("app=a&delete=true"));
        assert_eq!(registration("app=a&X-legacy.sender=1"), registration("app=a&sender=1"));
    }

    #[test]
    fn rg_17_rg_18_core_a_topic_makes_a_subscription_of_a_token_or_its_end() {
        let (application, token, topic) = ("a".to_owned(), "i:T".to_owned(), "x".to_owned());
        let subscription = Subscription { application, token, topic };
        for topic in
            ["scope=/topics/x", "X-scope=/topics/x", "X-gcm.topic=/topics/x", "scope=/topics/x&X-gcm.topic=/topics/x"]
        {
            let form = format!("app=a&sender=i:T&{topic}");
            assert_eq!(operation(&form), Ok(RegisterOp::Subscribe(subscription.clone())));
            assert_eq!(operation(&format!("{form}&delete=1")), Ok(RegisterOp::Unsubscribe(subscription.clone())));
        }
        for topic in ["scope=/topics/", "scope=/topics/a b", "gcm.topic=x", "scope=/topics/x&X-gcm.topic=/topics/y"] {
            assert_eq!(
                operation(&format!("app=a&sender=i:T&{topic}")),
                Err(RegisterError::InvalidParameters),
                "{topic}"
            );
        }
    }

    #[test]
    fn rg_13_rg_16_core_deletes_are_told_apart() {
        let application = || "a".to_owned();
        assert_eq!(
            operation("app=a&delete=1&sender=1"),
            Ok(RegisterOp::DeleteApplication { application: application() })
        );
        let iid = Iid::parse("eAbCdEfGhIj").unwrap();
        let instance = RegisterOp::DeleteInstance { application: application(), iid: iid.clone() };
        assert_eq!(operation("app=a&delete=true&sender=*&scope=*&appid=eAbCdEfGhIj"), Ok(instance));
        let token = operation("app=a&delete=true&sender=1&scope=GCM&appid=eAbCdEfGhIj&X-subtype=s");
        assert!(matches!(token, Ok(RegisterOp::DeleteToken { iid: Some(found), .. }) if found == iid));
        for value in ["0", "false", "yes", ""] {
            assert!(matches!(operation(&format!("app=a&sender=1&delete={value}")), Ok(RegisterOp::Register(_))));
        }
    }

    #[test]
    fn rg_05_core_every_error_has_its_status_and_handsets_read_400() {
        for error in RegisterError::ALL {
            assert!(error.body().starts_with("Error=") && !error.body().ends_with('\n'));
            let (others, handset) = (error.status(false), error.status(true));
            assert!(others == handset || (others, handset) == (200, 400), "{error}");
        }
        assert!(is_handset("Android-GCM/1.5 (x)") && !is_handset("curl"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(body: Vec<u8>) {
            let _ = RegisterForm::parse(&body).operation();
        }
    }
}
