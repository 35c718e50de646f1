-- mark: notifications were read, on one device; the others are told.
--
-- KEYS[1]  ts:{<partition>}:meta:<user>
-- ARGV     device, by, [ids: 'id id', at most 100; up_to: seq; up_to_id; events]
-- Reply    {unread, number marked}

local given, wrong = ledger.arguments {
  device = 1, by = 1, ids = 1, up_to = 1, up_to_id = 1, events = 1,
}
if not given then return ledger.refuse(wrong) end
local box = ledger.named_box()
if not box or ledger.shared then
  return ledger.refuse('the key is not ts:{<partition>}:meta:<user>')
end
ledger.events_max = ledger.number(given, 'events', 10000, 0, 1e9)
local up_to = ledger.number(given, 'up_to', 0, 0, 1e15)
local ids = {}
for id in string.gmatch(given.ids or '', '%S+') do ids[#ids + 1] = id end
if #ids > 100 then given.problem = 'there are more than 100 ids' end
local device = ledger.cursor_field(given.device):sub(3)
if #device > 128 then given.problem = 'device has more than 128 bytes' end
wrong = given.problem or ledger.open(box)
if wrong then return ledger.refuse(wrong) end

local marked = {}

local function mark(id)
  local key = PREFIX .. 'n:' .. id
  local was = call('HMGET', key, 'state', 'user', 'place')
  local rank = RANK[was[1]]
  local ms, n = ledger.place(was[3])
  if not ms or not rank or rank >= RANK.read or was[2] ~= box.user then return end
  call('HSET', key, 'state', 'read')
  if call('HLEN', key) < LIFE_FIELDS then call('HSET', key, 'd:' .. device, now) end
  ledger.discount(box, ms)
  marked[#marked + 1] = id
  local seq = ledger.seq_of(n)
  if rank < RANK.received then ledger.tell('received', box, id, seq, device, '') end
  ledger.tell('read', box, id, seq, device, '')
end

-- Marks all up to a seq. What lies up to read_to has been marked before.
local function mark_up_to(seq)
  local start = ledger.later(ledger.detail(box, 'read_to'))
  local _, start_n = ledger.place(start)
  if seq <= ledger.seq_of(start_n) then return end
  local reached = box.last
  ledger.each_notification(box.inbox, start, '+', function(ms, n, id)
    if ledger.seq_of(n) > seq then
      reached = ledger.placed(ms, n - 1)
      return true
    end
    mark(id)
  end)
  ledger.change(box, 'read_to', reached)
end

for _, id in ipairs(ids) do mark(id) end
if given.up_to_id then
  local was = call('HMGET', PREFIX .. 'n:' .. given.up_to_id, 'user', 'seq')
  if was[1] == box.user then up_to = math.max(up_to, ledger.whole(was[2]) or 0) end
end
mark_up_to(up_to)
if marked[1] then ledger.announce(box, 'read', marked, given.by or '') end
if box.is_new or box.changes[1] then ledger.save(box) end
return { box.unread, #marked }
