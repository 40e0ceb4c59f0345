//! [`Fields`]: takes the fields of a request one by one, so that whatever is left over is unknown.

use crate::{Error, Result};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// A request's fields, not yet taken. `null` counts as absent.
pub(super) struct Fields {
    left: Map<String, Value>,
    /// Whether a test wants to know which are asked for.
    #[cfg(test)]
    watched: bool,
}

#[cfg(test)]
thread_local! {
    /// Of the next object that is read on this thread: the names it was asked for.
    static ASKED: std::cell::RefCell<Option<std::collections::BTreeSet<String>>> = const { std::cell::RefCell::new(None) };
    static WATCH_NEXT: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// The fields that `read` asks its outermost object for.
#[cfg(test)]
pub(super) fn asked_by<T>(read: impl FnOnce() -> T) -> (T, std::collections::BTreeSet<String>) {
    ASKED.set(Some(Default::default()));
    WATCH_NEXT.set(true);
    let result = read();
    (result, ASKED.take().unwrap_or_default())
}

impl Fields {
    pub(super) fn new(fields: Map<String, Value>) -> Self {
        Self {
            left: fields,
            #[cfg(test)]
            watched: WATCH_NEXT.replace(false),
        }
    }

    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        #[cfg(test)]
        if self.watched {
            ASKED.with_borrow_mut(|asked| asked.as_mut().map(|asked| asked.insert(name.to_owned())));
        }
        self.left.remove(name).filter(|value| !value.is_null())
    }

    /// Takes a list that says nothing, where it is empty.
    pub(super) fn drop_empty(&mut self, name: &str) {
        if self.left.get(name).and_then(Value::as_array).is_some_and(Vec::is_empty) {
            self.left.remove(name);
        }
    }

    /// Takes a field that asks for what is done in any case.
    pub(super) fn drop_if(&mut self, name: &str, done: bool) {
        if self.left.get(name) == Some(&Value::Bool(done)) {
            self.left.remove(name);
        }
    }

    /// Puts in what was found elsewhere.
    pub(super) fn put(&mut self, name: &str, value: Value) {
        self.left.insert(name.to_owned(), value);
    }

    fn take_as<T>(&mut self, name: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| wrong(name, expected, &value))
    }

    /// A number in `range`.
    pub(super) fn number(&mut self, name: &str, range: RangeInclusive<f32>) -> Result<Option<f32>> {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        self.take_as(name, &expected, |v| v.as_f64().map(|x| x as f32).filter(|x| range.contains(x)))
    }

    /// A number above 0, at most `max`.
    pub(super) fn positive(&mut self, name: &str, max: f32) -> Result<Option<f32>> {
        let expected = format!("a number above 0, at most {max}");
        let read = |x: f64| (x as f32).max(f32::MIN_POSITIVE);
        self.take_as(name, &expected, |v| v.as_f64().filter(|&x| x > 0.0 && x <= f64::from(max)).map(read))
    }

    /// A whole number in `range`.
    pub(super) fn count(&mut self, name: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        let read = |v: &Value| v.as_u64().and_then(|x| usize::try_from(x).ok()).filter(|x| range.contains(x));
        self.take_as(name, &expected, read)
    }

    /// Any 64-bit integer, signed or not.
    pub(super) fn integer(&mut self, name: &str) -> Result<Option<u64>> {
        self.take_as(name, "a 64-bit integer", |v| v.as_u64().or_else(|| v.as_i64().map(i64::cast_unsigned)))
    }

    pub(super) fn boolean(&mut self, name: &str) -> Result<Option<bool>> {
        self.take_as(name, "true or false", Value::as_bool)
    }

    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>> {
        self.take_as(name, "a string", |v| v.as_str().map(str::to_owned))
    }

    pub(super) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>> {
        self.take_as(name, "an object", |v| v.as_object().cloned())
    }

    /// Refuses whatever is left; fields in `unsupported` are OpenAI's but not ours.
    pub(super) fn finish(self, unsupported: &[&str]) -> Result<()> {
        let Some((name, _)) = self.left.iter().find(|(_, value)| !value.is_null()) else { return Ok(()) };
        if unsupported.contains(&name.as_str()) {
            return Err(Error::field(name, format!("`{name}` is not supported by this server; leave it out")));
        }
        Err(Error::field(name, format!("unknown field `{name:.80}`; check its spelling or leave it out")))
    }
}

/// The error of a field that lies in another one, under its whole path.
pub(super) fn inside(outer: &str, error: Error) -> Error {
    match error {
        Error::Field { field, message } => Error::field(format!("{outer}.{field}"), message),
        other => other,
    }
}

/// "`name`: expected ..., found ...", the value shortened.
pub(super) fn wrong(name: &str, expected: &str, found: &Value) -> Error {
    let shown = match found {
        Value::Array(items) => format!("an array of {}", items.len()),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) if text.len() > 40 => format!("a string of {} bytes", text.len()),
        other => other.to_string(),
    };
    Error::field(name, format!("`{name}`: expected {expected}, found {shown}"))
}
