-- read: what a reader has missed, a page of it, with exact gaps.
--
-- KEYS[1]  ts:{<partition>}:meta:<owner>
-- ARGV     [device, connect, ack, point, garbage, head, channel, nonce, all, limit, bytes]
-- Reply    {epoch, start, reached, unread, more, why, all, item...}; an item is one of
--          {'n', place, id, type, payload, expires, attempt, state, traceparent or '', sender?}
--          {'u', place, state, 'id id id'}
--          {'g', from seq, to seq, missing, reason}
--
-- How gaps are found: seqs are contiguous, so what lies between two notifications is missing unless
-- it is in a hole. Up to `trimmed` it went because there were too many, above that it expired.

-- The clocks on both sides of a failover may differ. A reader from before one is given once more
-- what is up to so many ms older than its place.
local FAILOVER_OVERLAP = 60000

-- A topic to which nothing was ever published has no keys: clients may ask for any number of them.
-- Its epoch has this name, from which is gone on in whatever epoch begins: nothing was before it.
local UNWRITTEN = 'new'

local box, given
local items = {}

---- Gaps

local firsts, last_of -- the holes; read when they are needed

-- How many of these seqs were withdrawn on purpose.
local function withdrawn(from, to)
  if not firsts then
    local first = ledger.whole(call('HGET', PREFIX .. 'holes:' .. box.owner, 'e' .. to))
    if first and first <= from then return to - from + 1 end -- one hole is all there is, usually
    firsts, last_of = ledger.holes(box)
  end
  local count = 0
  for i = 1, #firsts do
    local first = firsts[i]
    if first > to then break end
    count = count + math.max(0, math.min(to, last_of[first]) - math.max(from, first) + 1)
  end
  return count
end

local function add_gap(from, to, reason)
  if from > to then return end
  local missing = to - from + 1 - withdrawn(from, to)
  if missing > 0 then items[#items + 1] = { 'g', from, to, missing, reason } end
end

-- These seqs are not there (none, if `to` is less).
local function miss(from, to)
  if from > to then return end
  local _, n = ledger.place(ledger.detail(box, 'trimmed'))
  local trimmed = ledger.seq_of(n or 0)
  add_gap(from, math.min(to, trimmed), 'trimmed')
  add_gap(math.max(from, trimmed + 1), to, 'expired')
end

---- Where to begin

-- The place that a reader continues from, why, and whether what it knew is of another epoch.
local function beginning(known)
  if given.point then
    local epoch, where = ledger.split_point(given.point)
    if epoch == UNWRITTEN and ledger.of_topics then return '0-0', '', false end
    if epoch == box.epoch then return where, '', false end
    return '0-0', 'epoch', true
  end
  if given.garbage then return '0-0', 'epoch', true end
  if known and (given.device or given.ack) then
    if known.lost then return '0-0', 'epoch', true end
    return given.ack and known.acked or known.received, '', false
  end
  -- What any device has received, is received: for readers without a name, and for new devices.
  local received = ledger.detail(box, 'received')
  if received then return ledger.later(received), given.device and 'new' or '', false end
  return given.head and box.last or '0-0', 'new', false
end

-- The lowest seq that was given twice, if a place is not of the history that the inbox tells; else
-- nil. In one history, what is later in the stream has a higher seq.
local function contradiction(ms, n, entries)
  local seq, lowest = ledger.seq_of(n), nil
  local function check(where)
    local other_ms, other_n = ledger.place(where)
    if not other_ms or not ledger.is_after(other_ms, other_n, ms, n) then return end
    local other = ledger.seq_of(other_n)
    if other < seq or (other == seq and other_n % SPAN == 0) then
      lowest = math.min(lowest or other, other)
    end
  end
  if seq > box.seq or ledger.is_after(ms, n, box.ms, box.n) then
    lowest = math.min(seq, box.seq + 1)
  end
  check(ledger.detail(box, 'trimmed'))
  check(ledger.detail(box, 'expired'))
  check(entries[1] and entries[1][1])
  local _, first_n = ledger.place(entries[1] and entries[1][1])
  if not lowest and ms > 0 and ledger.seq_of(first_n or (box.seq + 1) * SPAN) > seq + 1 then
    -- Before a gap is announced: a master whose clock is behind has put new ones before the place.
    local before = call('XREVRANGE', box.inbox, ledger.placed(ms, n), '-', 'COUNT', 1)[1]
    local _, other_n = ledger.place(before and before[1])
    if other_n and ledger.seq_of(other_n) > seq then lowest = seq end
  end
  return lowest
end

-- The seq before the first that is there. To who begins, nothing older is missing.
local function before_all(entries)
  for i = 1, #entries do
    local _, n = ledger.place(entries[i][1])
    local fields = ledger.fields_of(entries[i])
    if n and fields.i and (ledger.whole(fields.x) or 0) > now then return ledger.seq_of(n) - 1 end
  end
  return box.seq
end

-- Where a reader from before a failover begins, and what is there.
local function after_failover(ms, count)
  local from = ledger.placed(math.max(0, math.min(ms, box.ms) - FAILOVER_OVERLAP), 0)
  local entries = call('XRANGE', box.inbox, from, '+', 'COUNT', count)
  local first_ms, first_n = ledger.place(entries[1] and entries[1][1])
  if not first_ms then return box.last, entries end
  return ledger.placed(first_ms, math.max(0, first_n - 1)), entries
end

---- What is there

-- The state of a notification, and how often this reader was handed it, with this time.
local function hand_out(id)
  if ledger.of_topics then return 'accepted', 1 end -- nothing else becomes of it while it is here
  local key = PREFIX .. 'n:' .. id
  local was = call('HMGET', key, 'state', 'live')
  if not was[1] then return 'accepted', 1 end
  -- A full Redis refuses to count; what it has can be read all the same.
  if not was[2] then redis.pcall('HSET', key, 'live', 0) end
  if ledger.shared then return was[1], 1 end
  local field = 't:' .. (given.device or '-')
  local attempt = redis.pcall('HINCRBY', key, field, 1)
  if type(attempt) ~= 'number' then return was[1], 1 end
  if attempt == 1 and call('HLEN', key) > LIFE_FIELDS then call('HDEL', key, field) end
  return was[1], attempt
end

-- Puts entries on the page. Returns the place up to which it tells everything, and 1 if there is
-- more behind it.
local function fill(entries, seq, limit, bytes)
  local reached, is_first = nil, true
  for i = 1, #entries do
    local where, fields = entries[i][1], ledger.fields_of(entries[i])
    local _, n = ledger.place(where)
    local expires = n and fields.i and fields.t and fields.p and ledger.whole(fields.x) or 0
    -- What it becomes as frames, about: an update is one for each of its ids.
    local size = expires > now and #fields.p + 400 or 0
    if n and fields.u then size = 4 * #(fields.i or '') + 200 end
    if i > limit or (size > bytes and not is_first) then
      local _, last = ledger.place(reached)
      miss(seq + 1, ledger.seq_of(last or 0))
      return reached, 1
    end
    if n and fields.u then
      miss(seq + 1, ledger.seq_of(n))
      seq = math.max(seq, ledger.seq_of(n))
      is_first, bytes = false, bytes - size
      items[#items + 1] = { 'u', where, fields.u, fields.i or '' }
    elseif expires > now then
      miss(seq + 1, ledger.seq_of(n) - 1)
      seq, is_first, bytes = ledger.seq_of(n), false, bytes - size
      local state, attempt = hand_out(fields.i)
      items[#items + 1] = { 'n', where, fields.i, fields.t, fields.p, expires, attempt, state,
        fields.c or '', fields.f }
    end
    reached = where
  end
  miss(seq + 1, box.seq)
  return box.last, 0
end

---- A client has come

local function note_channel()
  if given.channel == (box.channel or ledger.usual_channel(box)) then return end
  if given.channel == ledger.usual_channel(box) then
    box.channel = nil
    call('HDEL', box.meta, 'channel')
  else
    ledger.change(box, 'channel', given.channel)
  end
end

local function note_device(known, start, is_elsewhere)
  if not known or is_elsewhere then
    known = { sent = start, received = start, acked = start, all = known and known.all or '' }
  end
  if known.all == '' then known.all = given.all or '' end
  ledger.record(box, given.device, known)
  return known
end

----

local wrong
given, wrong = ledger.arguments {
  device = 1, connect = 1, ack = 1, point = 1, garbage = 1, head = 1, channel = 1, nonce = 1,
  all = 1, limit = 1, bytes = 1,
}
if not given then return ledger.refuse(wrong) end
box = ledger.named_box()
if not box then return ledger.refuse('the key is not ts:{<partition>}:meta:<owner>') end
local limit = ledger.number(given, 'limit', 64, 1, 1000)
local bytes = ledger.number(given, 'bytes', 262144, 1, 1e9)
if given.device and #given.device > 128 then given.problem = 'device has more than 128 bytes' end
if given.all and not ledger.split_point(given.all) then given.problem = 'all is no point' end
if given.nonce and not (#given.nonce <= 16 and given.nonce:find('^[a-z0-9]+$')) then
  given.problem = 'nonce is not 1 to 16 of a-z and 0-9'
end
wrong = given.problem or ledger.open(box, given.nonce)
if wrong then return ledger.refuse(wrong) end

local is_unwritten = box.is_new and ledger.of_topics and box.last == '0-0'
if is_unwritten then box.epoch = UNWRITTEN end
local known = not ledger.shared and ledger.recorded(box, given.device) or nil
local start, why, is_lost = beginning(known)
local is_elsewhere = is_lost
local reached, more = start, 0
-- Nobody knows how many of another epoch are missing.
if is_lost then items[1] = { 'g', 0, 0, 0, 'epoch' } end
if start ~= box.last then
  local ms, n = ledger.place(start)
  local seq = math.max(ledger.seq_of(n), ledger.whole(ledger.detail(box, 'base')) or 0)
  start = ledger.placed(ms, n)
  local entries = call('XRANGE', box.inbox, '(' .. start, '+', 'COUNT', limit + 1)
  local twice = not is_lost and contradiction(ms, n, entries)
  if twice then
    local from, to = math.max(1, twice), math.max(1, twice, ledger.seq_of(n))
    items[1] = { 'g', from, to, to - from + 1, 'failover' }
    start, entries = after_failover(ms, limit + 1)
    ms, n = ledger.place(start)
    seq, why, is_elsewhere = ledger.seq_of(n), 'failover', true
  end
  if why == 'new' and ledger.of_topics then seq = before_all(entries) end
  reached, more = fill(entries, seq, limit, bytes)
end
if why == '' and items[1] and items[1][1] == 'g' then why = items[1][5] end

if given.connect then
  if given.channel then note_channel() end
  -- One without a name is noted where it stands in the stream for everyone, once.
  local is_noted = given.device or (given.all and not (known and known.all ~= ''))
  if is_noted and not ledger.shared then
    local is_done, noted = pcall(note_device, known, start, is_elsewhere)
    known = is_done and noted or known
  end
  call('PEXPIRE', box.meta, KEPT)
end
if (box.is_new or box.changes[1]) and not is_unwritten then ledger.save(box) end
local all = known and known.all or ''
return { box.epoch, start, reached, box.unread, more, why, all, unpack(items) }
