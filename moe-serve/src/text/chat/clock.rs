//! `strftime_now`: today's date for templates that name it, in UTC.

use std::fmt::Write as _;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// From the day of 1970-01-01.
const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
const SECONDS_PER_DAY: u64 = 86_400;

/// `format` with its directives replaced by parts of the moment `seconds` after 1970 began.
///
/// # Errors
/// The directive that is not known.
pub(super) fn strftime(format: &str, seconds: u64) -> Result<String, String> {
    let days = seconds / SECONDS_PER_DAY;
    let (year, month, day) = civil(days);
    let of_day = seconds % SECONDS_PER_DAY;
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    let (month_name, weekday) = (MONTHS[month - 1], WEEKDAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next().ok_or("a `%` at the end")?;
        // `-` leaves leading zeros out, with glibc.
        let (padded, directive) = match directive {
            '-' => (false, chars.next().ok_or("a `%-` at the end")?),
            directive => (true, directive),
        };
        let width = |digits: usize| if padded { digits } else { 0 };
        match directive {
            'Y' => write!(out, "{year}"),
            'y' => write!(out, "{:01$}", year % 100, width(2)),
            'm' => write!(out, "{month:00$}", width(2)),
            'd' => write!(out, "{day:00$}", width(2)),
            'e' => write!(out, "{day:>0$}", width(2)),
            'j' => write!(out, "{:01$}", days - days_before(year) + 1, width(3)),
            'H' => write!(out, "{hour:00$}", width(2)),
            'I' => write!(out, "{:01$}", (hour + 11) % 12 + 1, width(2)),
            'M' => write!(out, "{minute:00$}", width(2)),
            'S' => write!(out, "{second:00$}", width(2)),
            'p' => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            'B' => write!(out, "{month_name}"),
            'b' | 'h' => write!(out, "{}", &month_name[..3]),
            'A' => write!(out, "{weekday}"),
            'a' => write!(out, "{}", &weekday[..3]),
            'F' => write!(out, "{year}-{month:02}-{day:02}"),
            'T' => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            'Z' => write!(out, "UTC"),
            'z' => write!(out, "+0000"),
            '%' => write!(out, "%"),
            other => return Err(format!("`%{other}` is not known")),
        }
        .map_err(|e| e.to_string())?;
    }
    Ok(out)
}

/// Days from 1970 to the first of January of `year`.
fn days_before(year: u64) -> u64 {
    let leap_days = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leap_days(year - 1) - leap_days(1969)
}

/// Year, month from 1 and day from 1 of the day that is so many after 1970-01-01.
fn civil(days: u64) -> (u64, usize, u64) {
    // The estimate is at most one year too late.
    let mut year = 1970 + days / 365;
    while days_before(year) > days {
        year -= 1;
    }
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut day = days - days_before(year);
    let lengths = [31, 28 + u64::from(leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    (year, month + 1, day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wanted: Python's `datetime.fromtimestamp(seconds, timezone.utc).strftime(format)`.
    #[test]
    fn dates() {
        for (seconds, format, want) in [
            (0, "%Y-%m-%d %H:%M:%S %A %j", "1970-01-01 00:00:00 Thursday 001"),
            (951_782_399, "%d %b %Y, %I:%M %p", "28 Feb 2000, 11:59 PM"),
            (951_868_799, "%d %B %y %a", "29 February 00 Tue"),
            (1_735_689_599, "%j %-d/%-m", "366 31/12"),
            (1_790_000_000, "%F %T %e%%", "2026-09-21 14:13:20 21%"),
            (4_107_542_400, "%Y-%m-%d", "2100-03-01"),
        ] {
            assert_eq!(strftime(format, seconds).as_deref(), Ok(want));
        }
        assert!(strftime("%Q", 0).is_err() && strftime("%", 0).is_err());
    }
}
