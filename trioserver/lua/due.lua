-- due: what the clock asks for in one partition. `x:<id>` expires, `f:<id>` was to be received by
-- now, `d:<id>` is to be published. Any number of schedulers may call it.
--
-- KEYS[1]  ts:{<partition>}:due
-- ARGV     [limit, events, max]
-- Reply    {number done, ms until the next or -1}

local given, wrong = ledger.arguments { limit = 1, events = 1, max = 1 }
if not given then return ledger.refuse(wrong) end
if KEYS[1] ~= PREFIX .. 'due' then return ledger.refuse('the key is not ts:{<partition>}:due') end
local limit = ledger.number(given, 'limit', 50, 1, 1000)
local inbox_limit = ledger.number(given, 'max', 1000, 1, 1e6)
ledger.events_max = ledger.number(given, 'events', 10000, 0, 1e9)
if given.problem then return ledger.refuse(given.problem) end

local function expire(box, id, life)
  if not ledger.place(life.place) then return end
  local ended, shown = ledger.finish(box, id, life.place, 'expired', '')
  if call('XDEL', box.inbox, life.place) == 1 then
    local last = ledger.detail(box, 'expired')
    ledger.change(box, 'expired', ledger.later(last, life.place))
  end
  if ended and shown and not ledger.of_topics then ledger.announce(box, 'expired', { id }, '') end
end

local function fall_back(box, id, life)
  if (RANK[life.state] or 0) < RANK.received then
    ledger.tell('undelivered', box, id, ledger.whole(life.seq) or 0, '', '')
  end
end

-- Publishes what was scheduled, as if it were published now.
local function deliver(box, id, life)
  local key = PREFIX .. 'n:' .. id
  local expires = ledger.whole(life.expires)
  if life.state ~= 'accepted' or life.place or not expires or not life.payload then return end
  call('HDEL', key, 'payload', 'trace', 'collapse', 'channel', 'sender', 'max')
  if expires <= now then -- nobody has called for that long
    call('HSET', key, 'state', 'expired')
    ledger.tell('expired', box, id, 0, '', '')
    return
  end
  ledger.post(box, {
    id = id,
    type = life.type or 'notification',
    payload = life.payload,
    expires = expires,
    at = life.at,
    trace = life.trace,
    collapse = life.collapse,
    fallback = ledger.whole(life.fallback),
    channel = life.channel,
    sender = life.sender,
  }, ledger.whole(life.max) or inbox_limit)
end

local ACTS = { x = expire, f = fall_back, d = deliver }

local boxes = {} -- by user: a call may do a lot for one user, and saves it once

local function box_for(user)
  if boxes[user] == nil then
    local box = ledger.box_of(ledger.encoded(user))
    boxes[user] = not ledger.open(box) and box
  end
  return boxes[user]
end

local members = call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, limit)
for _, member in ipairs(members) do
  call('ZREM', KEYS[1], member)
  local kind, id = member:match('^([xfd]):(.+)$')
  local life = {}
  local list = kind and call('HGETALL', PREFIX .. 'n:' .. id) or {}
  for i = 1, #list, 2 do life[list[i]] = list[i + 1] end
  local box = life.user and box_for(life.user)
  if box then ACTS[kind](box, id, life) end
end
for _, box in pairs(boxes) do
  if box then ledger.save(box) end
end

local next_member = call('ZRANGEBYSCORE', KEYS[1], '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
local wait = next_member[2] and math.max(0, tonumber(next_member[2]) - now) or -1
return { #members, wait }
