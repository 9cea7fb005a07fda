//! Which restore points a policy keeps. No clock is read here and nothing is forgotten.
//!
//! ```text
//! points of a VM, newest first → of each period the newest, as many periods as the policy says → kept, and why
//! ```
//!
//! Periods are those of UTC, as the times that `list` prints: an hour, a day, a week from Monday on (ISO 8601), a month, a year. Only
//! periods that have a restore point count, so what was missed while a machine was off costs nothing that is older.

use std::cmp::Reverse;
use std::fmt;

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use reseal_format::retention::Policy;
use reseal_format::time::Timestamp;

/// Why a point is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    Held,
    Last,
    Within,
    Hourly,
    Daily,
    Weekly,
    Monthly,
    Yearly,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Why::Held => "held",
            Why::Last => "last",
            Why::Within => "within",
            Why::Hourly => "hourly",
            Why::Daily => "daily",
            Why::Weekly => "weekly",
            Why::Monthly => "monthly",
            Why::Yearly => "yearly",
        })
    }
}

/// A restore point, as far as a policy looks at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    pub number: u32,
    pub created: Timestamp,
    pub held: bool,
}

/// What names a period of each length.
fn period(why: Why, time: DateTime) -> (i16, i16, i16) {
    match why {
        Why::Hourly => (time.year(), time.day_of_year(), time.hour().into()),
        Why::Daily => (time.year(), time.day_of_year(), 0),
        Why::Weekly => {
            let week = time.date().iso_week_date();
            (week.year(), week.week().into(), 0)
        }
        Why::Monthly => (time.year(), time.month().into(), 0),
        _ => (time.year(), 0, 0),
    }
}

/// Why each of these points, which are of one VM, is kept; those for no reason may go. In their order.
pub fn judge(policy: &Policy, points: &[Candidate]) -> Vec<(Candidate, Vec<Why>)> {
    let mut judged: Vec<(Candidate, Vec<Why>)> = points.iter().map(|point| (*point, Vec::new())).collect();
    let mut newest_first: Vec<usize> = (0..points.len()).collect();
    // Of two of one moment the later number is the newer.
    newest_first.sort_by_key(|&nth| Reverse((points[nth].created, points[nth].number)));
    let Some(&newest) = newest_first.first() else { return judged };
    let within = policy.within.map(|seconds| i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX));
    let oldest = within.map(|span| points[newest].created.0.saturating_sub(span));
    for (rank, &nth) in newest_first.iter().enumerate() {
        let (point, reasons) = &mut judged[nth];
        let last = rank < usize::try_from(policy.last).unwrap_or(usize::MAX);
        let within = oldest.is_some_and(|oldest| point.created.0 >= oldest);
        let found = [(point.held, Why::Held), (last, Why::Last), (within, Why::Within)];
        reasons.extend(found.into_iter().filter(|(is, _)| *is).map(|(_, why)| why));
    }
    for (count, why) in [
        (policy.hourly, Why::Hourly),
        (policy.daily, Why::Daily),
        (policy.weekly, Why::Weekly),
        (policy.monthly, Why::Monthly),
        (policy.yearly, Why::Yearly),
    ] {
        let (mut left, mut before) = (count, None);
        for &nth in newest_first.iter().take_while(|_| count > 0) {
            let moment = jiff::Timestamp::from_millisecond(points[nth].created.0.clamp(0, Timestamp::LAST.0));
            let time = TimeZone::UTC.to_datetime(moment.unwrap_or(jiff::Timestamp::UNIX_EPOCH));
            let period = Some(period(why, time));
            if period == before {
                continue;
            }
            if left == 0 {
                break;
            }
            (left, before) = (left - 1, period);
            judged[nth].1.push(why);
        }
    }
    judged
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: i64 = 3_600_000;

    fn at(number: u32, text: &str) -> Candidate {
        Candidate { number, created: Timestamp::parse(text).unwrap(), held: false }
    }

    fn kept(policy: Policy, points: &[Candidate]) -> Vec<(u32, String)> {
        let words = |whys: &[Why]| whys.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let judged = judge(&policy, points);
        judged.iter().filter(|(_, whys)| !whys.is_empty()).map(|(point, whys)| (point.number, words(whys))).collect()
    }

    #[test]
    fn of_each_period_the_newest_stays_and_periods_without_points_do_not_count() {
        let points = [
            at(1, "2024-12-29T10:00:00Z"),
            at(2, "2024-12-30T10:00:00Z"),
            at(3, "2025-01-01T10:00:00Z"),
            at(4, "2025-01-01T23:59:59.999Z"),
            at(5, "2025-01-02T00:00:00Z"),
            at(6, "2025-03-01T00:00:00Z"),
        ];
        let of = |numbers: &[u32], word: &str| numbers.iter().map(|n| (*n, word.to_owned())).collect::<Vec<_>>();
        let policy = Policy::default();
        assert_eq!(kept(Policy { last: 2, ..policy.clone() }, &points), of(&[5, 6], "last"));
        assert_eq!(kept(Policy { daily: 3, ..policy.clone() }, &points), of(&[4, 5, 6], "daily"));
        // The 30th of December 2024 is in the first week of 2025.
        assert_eq!(kept(Policy { weekly: 9, ..policy.clone() }, &points), of(&[1, 5, 6], "weekly"));
        assert_eq!(kept(Policy { monthly: 2, ..policy.clone() }, &points), of(&[5, 6], "monthly"));
        assert_eq!(kept(Policy { yearly: 9, ..policy.clone() }, &points), of(&[2, 6], "yearly"));
        assert_eq!(kept(Policy { hourly: 2, ..policy.clone() }, &points), of(&[5, 6], "hourly"));
        let within = Some(59 * 86_400);
        assert_eq!(kept(Policy { within, ..policy.clone() }, &points), of(&[3, 4, 5, 6], "within"));
        let both = Policy { last: 1, yearly: 1, ..policy.clone() };
        assert_eq!(kept(both.clone(), &points), [(6, "last yearly".to_owned())]);
        let held = [Candidate { held: true, ..points[0] }, points[5]];
        assert_eq!(kept(Policy { last: 1, ..policy.clone() }, &held), [(1, "held".to_owned()), (6, "last".to_owned())]);
        assert_eq!(kept(Policy { last: 1, ..policy.clone() }, &[]), []);
        assert!(policy.is_empty() && !both.is_empty());
    }

    proptest! {
        /// Against what each rule says in words, counted anew for each point.
        #[test]
        fn a_policy_keeps_what_its_rules_say(
            hours in proptest::collection::vec(0i64..24 * 800, 0..60),
            counts in [0u32..5, 0..5, 0..5, 0..5, 0..5, 0..5],
            days in proptest::option::of(1u64..40),
        ) {
            let mut times: Vec<i64> = hours.iter().map(|hour| 1_700_000_000_000 + hour * HOUR / 3).collect();
            times.sort_unstable();
            let points: Vec<Candidate> = (1..)
                .zip(&times)
                .map(|(number, &ms)| Candidate { number, created: Timestamp(ms), held: number % 7 == 0 })
                .collect();
            let [last, hourly, daily, weekly, monthly, yearly] = counts;
            let within = days.map(|days| days * 86_400);
            let policy = Policy { last, hourly, daily, weekly, monthly, yearly, within, ..Policy::default() };
            let judged = judge(&policy, &points);
            prop_assert_eq!(judged.iter().map(|(point, _)| *point).collect::<Vec<_>>(), points.clone());
            let date = |point: &Candidate| point.created.to_rfc3339();
            let prefix = |point: &Candidate, length: usize| date(point)[..length].to_owned();
            // Whole weeks since a Monday.
            let week = |point: &Candidate| ((point.created.0 / HOUR / 24 + 3) / 7).to_string();
            for (point, whys) in &judged {
                let newer = points.iter().filter(|other| other.number > point.number);
                let rule = |count: u32, name: &dyn Fn(&Candidate) -> String| {
                    let mut periods: Vec<String> = newer.clone().map(name).collect();
                    let is_newest = !periods.contains(&name(point));
                    periods.sort();
                    periods.dedup();
                    is_newest && periods.len() < count as usize
                };
                let newest = points.last().unwrap();
                let expected = [
                    (point.held, Why::Held),
                    (newer.clone().count() < last as usize, Why::Last),
                    (within.is_some_and(|span| {
                        newest.created.0 - point.created.0 <= i64::try_from(span * 1000).unwrap()
                    }), Why::Within),
                    (rule(hourly, &|point| prefix(point, 13)), Why::Hourly),
                    (rule(daily, &|point| prefix(point, 10)), Why::Daily),
                    (rule(weekly, &week), Why::Weekly),
                    (rule(monthly, &|point| prefix(point, 7)), Why::Monthly),
                    (rule(yearly, &|point| prefix(point, 4)), Why::Yearly),
                ];
                let expected: Vec<Why> = expected.into_iter().filter(|(is, _)| *is).map(|(_, why)| why).collect();
                prop_assert_eq!(whys, &expected, "point {}", point.number);
            }
        }
    }
}
