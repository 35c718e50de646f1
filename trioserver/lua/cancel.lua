-- cancel: takes a notification back, unless it was read or is over.
--
-- KEYS[1]  ts:{<partition>}:meta:<owner>
-- ARGV     id, [events]
-- Reply    {outcome}: cancelled | too late | unknown

local given, wrong = ledger.arguments { id = 1, events = 1 }
if not given then return ledger.refuse(wrong) end
local box = ledger.named_box()
if not box then return ledger.refuse('the key is not ts:{<partition>}:meta:<owner>') end
ledger.events_max = ledger.number(given, 'events', 10000, 0, 1e9)
if given.problem then return ledger.refuse(given.problem) end

local id = given.id or ''
local key = PREFIX .. 'n:' .. id
local was = call('HMGET', key, 'state', 'user', 'place')
if not was[1] or was[2] ~= box.user then return { 'unknown' } end
if (RANK[was[1]] or 0) >= RANK.read then return { 'too late' } end
wrong = ledger.open(box)
if wrong then return ledger.refuse(wrong) end
if ledger.place(was[3]) then
  ledger.withdraw(box, id, was[3], 'cancelled')
else -- it is not yet due
  call('ZREM', PREFIX .. 'due', 'd:' .. id)
  call('HSET', key, 'state', 'cancelled', 'why', 'cancelled')
  call('HDEL', key, 'payload', 'trace', 'collapse', 'channel', 'sender', 'max')
  call('PEXPIREAT', key, now + DAY)
  ledger.tell('cancelled', box, id, 0, '', 'cancelled')
end
ledger.save(box)
return { 'cancelled' }
