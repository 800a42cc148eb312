//! Wall clocks that jump by an hour, forward or back, and later jump back.
//!
//! Nothing may expire early or live on, and nothing may be refused: no promise rests on the wall clock. A node that is started
//! while its clock is wrong is the hard case: it has no other time yet.

use super::{Fault, Site, Step, Struck, interposer::Field, on};
use crate::cluster::Member;

/// How far, seconds.
pub(super) const JUMP_SECS: i64 = 3_600;

/// Moves the clocks of these.
#[derive(Debug)]
pub(super) struct ClockJump {
    pub(super) victims: Vec<Member>,
    pub(super) secs: i64,
    /// Killed and started again while its clock is wrong.
    pub(super) restarted: Option<Member>,
}

impl Fault for ClockJump {
    fn on(&self) -> String {
        let restarted = self.restarted.map_or_else(String::new, |member| format!(", {member} started anew"));
        format!("{} by {} s{restarted}", on(&self.victims), self.secs)
    }

    fn begin<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, Struck> {
        Box::pin(async move {
            for victim in &self.victims {
                let control = &site.controls[victim];
                control.set(Field::Shifted, 0)?;
                control.set(Field::ClockSecs, self.secs.cast_unsigned())?;
            }
            if let Some(member) = self.restarted {
                site.touch(&[member]);
                site.cluster.process_mut(member).kill()?;
                site.revive(&[member]).await?;
            }
            Ok(Struck::Yes)
        })
    }

    fn end<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, ()> {
        Box::pin(async move {
            let mut shifted = 0;
            for victim in &self.victims {
                shifted += site.controls[victim].get(Field::Shifted)?;
                site.controls[victim].set(Field::ClockSecs, 0)?;
            }
            if shifted == 0 && self.restarted.is_some() {
                site.found("no run: nobody looked at a wall clock while it was wrong");
            }
            Ok(())
        })
    }
}
