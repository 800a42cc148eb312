//! The runtime that openraft runs on: tokio's, but tasks that sleep until a moment wake together.
//!
//! Every group has a timer of its own that ticks five times a heartbeat, and openraft spreads them on purpose. A node of 64 groups
//! woke a thousand times a second to find that nobody has to campaign yet. Here moments are rounded up to a grid, so that all groups
//! of the process tick at once. Owns the grid, leaves everything else to openraft's own runtime, and heartbeats to [`super::beats`].
//! The invariant: nobody wakes early, and at most one line late.

use std::{future::Future, sync::OnceLock, time::Duration};

use openraft::{
    OptionalSend,
    impls::TokioRuntime,
    rt::{AsyncRuntime, Instant as _},
};

/// Between two lines. Ticks only look whether a follower has to campaign, which is later by as much at most; what it waits for,
/// its leader's lease and its own timeout, is 2.4 s at least.
const GRID: Duration = Duration::from_millis(150);

/// Who sleeps for less is left alone: openraft gathers finished writes for a microsecond.
const SHORT: Duration = Duration::from_micros(10);

type Moment = <TokioRuntime as AsyncRuntime>::Instant;

/// See the module.
#[derive(Debug)]
pub(super) struct SharedTicks(TokioRuntime);

/// What is added to a moment that lies `ahead`, and `since` after the origin of the grid.
fn added(ahead: Duration, since: Duration) -> Duration {
    let past = since.as_nanos() % GRID.as_nanos();
    if ahead < SHORT || past == 0 {
        return Duration::ZERO;
    }
    Duration::from_nanos(u64::try_from(GRID.as_nanos() - past).unwrap_or(0))
}

/// One grid for all groups of the process.
fn origin() -> Moment {
    static ORIGIN: OnceLock<Moment> = OnceLock::new();
    *ORIGIN.get_or_init(Moment::now)
}

impl AsyncRuntime for SharedTicks {
    type JoinError = <TokioRuntime as AsyncRuntime>::JoinError;
    type JoinHandle<T: OptionalSend + 'static> = <TokioRuntime as AsyncRuntime>::JoinHandle<T>;
    type Sleep = <TokioRuntime as AsyncRuntime>::Sleep;
    type Instant = Moment;
    type TimeoutError = <TokioRuntime as AsyncRuntime>::TimeoutError;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = <TokioRuntime as AsyncRuntime>::Timeout<R, T>;
    type ThreadLocalRng = <TokioRuntime as AsyncRuntime>::ThreadLocalRng;
    type Mpsc = <TokioRuntime as AsyncRuntime>::Mpsc;
    type Watch = <TokioRuntime as AsyncRuntime>::Watch;
    type Oneshot = <TokioRuntime as AsyncRuntime>::Oneshot;
    type Mutex<T: OptionalSend + 'static> = <TokioRuntime as AsyncRuntime>::Mutex<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        TokioRuntime::spawn(future)
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        TokioRuntime::sleep(duration)
    }

    fn sleep_until(deadline: Moment) -> Self::Sleep {
        TokioRuntime::sleep_until(deadline + added(deadline - Moment::now(), deadline - origin()))
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(duration: Duration, future: F) -> Self::Timeout<R, F> {
        TokioRuntime::timeout(duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(deadline: Moment, future: F) -> Self::Timeout<R, F> {
        TokioRuntime::timeout_at(deadline, future)
    }

    fn is_panic(join_error: &Self::JoinError) -> bool {
        TokioRuntime::is_panic(join_error)
    }

    fn thread_rng() -> Self::ThreadLocalRng {
        TokioRuntime::thread_rng()
    }

    fn new(threads: usize) -> Self {
        SharedTicks(TokioRuntime::new(threads))
    }

    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        self.0.block_on(future)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// openraft's, with heartbeats of 300 ms.
    const TICK: Duration = Duration::from_millis(60);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn ticks_of_different_moments_come_together_and_none_comes_early() {
        let woken = |due: Duration| due + added(TICK, due);
        for due in 600_001..=600_150 {
            assert_eq!(woken(ms(due)), ms(600_150));
        }
        assert_eq!(woken(ms(600_151)), ms(600_300));
        assert_eq!(woken(Duration::from_nanos(150_000_001)), ms(300));
    }

    #[test]
    fn a_tick_comes_at_every_line_whatever_its_phase_and_never_a_line_late() {
        for tick in [20, 60, 150] {
            for phase in 0..150 {
                // As openraft does it: whole periods after its first moment, whatever the delay was.
                let (first, tick) = (ms(1_000 + phase), ms(tick));
                let (mut due, mut now, mut woken) = (first, first - tick, Vec::new());
                for _ in 0..100 {
                    let at = due + added(due.saturating_sub(now), due);
                    assert!(at >= due && at < due + GRID);
                    woken.push(at);
                    let periods = (at - first).as_millis() / tick.as_millis() + 1;
                    due = first + tick * u32::try_from(periods).unwrap();
                    now = at;
                }
                assert!(woken.windows(2).all(|pair| pair[1] - pair[0] == GRID), "{tick:?} {phase}");
            }
        }
    }

    #[test]
    fn a_slower_tick_comes_at_the_line_after_it_is_due() {
        let due = [ms(400_010), ms(400_410)];
        assert_eq!(due.map(|due| due + added(ms(400), due)), [ms(400_050), ms(400_500)]);
    }

    #[test]
    fn who_sleeps_for_a_moment_is_left_alone() {
        assert_eq!(added(Duration::from_micros(1), ms(7)), Duration::ZERO);
    }
}
