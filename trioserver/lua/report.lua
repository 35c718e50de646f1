-- report: how far a device is. Cumulative; what is behind what was known changes nothing.
--
-- KEYS[1]  ts:{<partition>}:meta:<user>
-- ARGV     device, [sent, received: points; acked: seq; acked_id; all: point; events]
-- Reply    {acked seq}
--
-- What was received counts as sent, what was acknowledged as received. An acknowledgement counts as
-- far as was sent.

local box, given, device

-- The later of a place and a point of this epoch, unless that lies in a future that a failover has
-- undone.
local function advanced(where, said)
  local epoch, there = ledger.split_point(said)
  if epoch ~= box.epoch then return where end
  local ms, n = ledger.place(there)
  if ledger.is_after(ms, n, box.ms, box.n) then return where end
  return ledger.later(where, ledger.placed(ms, n))
end

local function advanced_for_everyone(stored)
  local epoch, there = ledger.split_point(given.all)
  if not epoch then return stored end
  local stored_epoch, where = ledger.split_point(stored)
  return epoch .. '.' .. (stored_epoch == epoch and ledger.later(where, there) or there)
end

local function earlier(one, other)
  return ledger.later(one, other) == one and other or one
end

-- How far is acknowledged, if `sent` is how far was sent.
local function acknowledged(acked, sent)
  if given.acked_id then
    local was = call('HMGET', PREFIX .. 'n:' .. given.acked_id, 'user', 'place')
    if was[1] == box.user and ledger.place(was[2]) then
      acked = ledger.later(acked, earlier(was[2], sent))
    end
  end
  local seq = ledger.whole(given.acked) or 0
  local _, n = ledger.place(acked)
  if seq <= ledger.seq_of(n) then return acked end
  -- Up to just before the next one, whether the one with this seq is still there or not.
  local reached = sent
  ledger.each_notification(box.inbox, acked, sent, function(ms, own)
    if ledger.seq_of(own) <= seq then return false end
    reached = ledger.placed(ms, own - 1)
    return true
  end)
  return ledger.later(acked, reached)
end

-- Notes in the life of a notification what has newly happened to it on this device.
local function note(id, seq, sent, received, acked)
  local key = PREFIX .. 'n:' .. id
  local was = call('HMGET', key, 'state', 's:' .. device, 'r:' .. device, 'a:' .. device,
    't:' .. device)
  if not was[1] then return end
  local changes = {}
  local function set(field, value)
    changes[#changes + 1] = field
    changes[#changes + 1] = value
  end
  if was[2] or was[3] or was[4] or call('HLEN', key) < LIFE_FIELDS then
    if sent and not was[2] then
      set('s:' .. device, now)
      if not was[5] then set('t:' .. device, 1) end -- it went out live
    end
    if received and not was[3] then set('r:' .. device, now) end
    if acked and not was[4] then set('a:' .. device, now) end
  end
  local rank, state = RANK[was[1]] or 0, acked and 'acked' or received and 'received' or 'sent'
  if rank < RANK[state] then set('state', state) end
  if changes[1] then call('HSET', key, unpack(changes)) end
  if rank > RANK.read then return end -- it is over: nothing happens to it any more
  if rank < RANK.received and received then ledger.tell('received', box, id, seq, device, '') end
  if rank < RANK.acked and acked then ledger.tell('acked', box, id, seq, device, '') end
end

-- Whether a place lies behind `before` and up to `after`.
local function between(before, after)
  local before_ms, before_n = ledger.place(before)
  local after_ms, after_n = ledger.place(after)
  return function(ms, n)
    return ledger.is_after(ms, n, before_ms, before_n)
      and not ledger.is_after(ms, n, after_ms, after_n)
  end
end

-- Walks once over all that is new in any respect.
local function note_all(was, is)
  local start, stop
  for _, step in ipairs { 'sent', 'received', 'acked' } do
    if is[step] ~= was[step] then
      start = start and earlier(start, was[step]) or was[step]
      stop = stop and ledger.later(stop, is[step]) or is[step]
    end
  end
  if not start then return end
  local is_sent, is_received = between(was.sent, is.sent), between(was.received, is.received)
  local is_acked = between(was.acked, is.acked)
  ledger.each_notification(box.inbox, start, stop, function(ms, n, id)
    note(id, ledger.seq_of(n), is_sent(ms, n), is_received(ms, n), is_acked(ms, n))
  end)
end

----

local wrong
given, wrong = ledger.arguments {
  device = 1, sent = 1, received = 1, acked = 1, acked_id = 1, all = 1, events = 1,
}
if not given then return ledger.refuse(wrong) end
box = ledger.named_box()
if not box or ledger.shared then
  return ledger.refuse('the key is not ts:{<partition>}:meta:<user>')
end
ledger.events_max = ledger.number(given, 'events', 10000, 0, 1e9)
ledger.number(given, 'acked', 0, 0, 1e15)
device = ledger.cursor_field(given.device):sub(3)
if #device > 128 then given.problem = 'device has more than 128 bytes' end
wrong = given.problem or ledger.open(box)
if wrong then return ledger.refuse(wrong) end

local received_by_any = ledger.detail(box, 'received')
local was = ledger.recorded(box, device)
if not was or was.lost then
  local start = ledger.later(received_by_any)
  was = { sent = start, received = start, acked = start, all = was and was.all or '' }
end
local sent = advanced(advanced(was.sent, given.sent), given.received)
local acked = acknowledged(was.acked, sent)
local received = ledger.later(advanced(was.received, given.received), acked)
local is = { sent = sent, received = received, acked = acked, all = advanced_for_everyone(was.all) }
note_all(was, is)
ledger.record(box, device, is)
local furthest = ledger.later(received_by_any, received)
if furthest ~= (received_by_any or '0-0') then ledger.change(box, 'received', furthest) end
if box.is_new or box.changes[1] then ledger.save(box) end
local _, n = ledger.place(acked)
return { ledger.seq_of(n) }
