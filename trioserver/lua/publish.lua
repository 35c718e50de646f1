-- publish: takes a notification, once.
--
-- KEYS[1]  ts:{<partition>}:meta:<owner>
-- ARGV     id, payload, [type, ttl, channel, idempotency_key, idempotency_ttl, collapse_key,
--          deliver_at, fallback_after, max, events, max_size, traceparent, rate, priority];
--          times in ms. To topics also sender, but not fallback_after
-- Reply    {id, point, seq, outcome}; outcome accepted | duplicate | scheduled (no point, seq 0)
-- Errors   BADREQUEST, IDEMPOTENCY, RATELIMITED <ms until it would be taken>: nothing has happened

-- What the server and its clients say themselves: nobody may publish what looks like it.
local RESERVED = ' connection_established gap update message_response heartbeat pong token_expiring'
  .. ' token_refreshed subscribed unsubscribed presence error goodbye auth refresh message ack read'
  .. ' subscribe unsubscribe publish ping lagging '

local UUID = '%-%x%x%x%x%x%x%x%x%-%x%x%x%x%-7%x%x%x%-[89ab]%x%x%x%-%x%x%x%x%x%x%x%x%x%x%x%x$'

---- Checks

-- Valid sequences become spaces, so that what is left over is seen. The frequent ones first.
local function is_utf8(value)
  if not value:find('[\128-\255]') then return true end
  for _, sequence in ipairs {
    '[\225-\236\238\239][\128-\191][\128-\191]',
    '[\194-\223][\128-\191]',
    '\240[\144-\191][\128-\191][\128-\191]',
    '\224[\160-\191][\128-\191]',
    '\237[\128-\159][\128-\191]',
    '[\241-\243][\128-\191][\128-\191][\128-\191]',
    '\244[\128-\143][\128-\191][\128-\191]',
  } do
    value = value:gsub(sequence, ' ')
    if not value:find('[\128-\255]') then return true end
  end
  return false
end

local function is_scalar(token)
  if token == 'true' or token == 'false' or token == 'null' then return true end
  local int, rest = token:match('^%-?(%d+)(.*)$')
  if not int or int:find('^0.') then return false end
  rest = rest:gsub('^%.%d+', '')
  return rest == '' or rest:find('^[eE][+-]?%d+$') ~= nil
end

local function has_control_in_strings(bare)
  for inside in bare:gmatch('"([^"]*)"') do
    if inside:find('[%z\1-\31]') then return true end
  end
  return false
end

-- cjson takes NaN, 0x10, 007 and line breaks within strings, which no browser does.
local function is_json(value)
  if not pcall(cjson.decode, value) then return false end
  local bare = value:find('\\', 1, true) and value:gsub('\\.', '') or value
  -- One look for both: usually there is neither.
  if value:find('[%z\1-\31\128-\255]') then
    if has_control_in_strings(bare) or not is_utf8(value) then return false end
  end
  bare = bare:gsub('"[^"]*"', '')
  if bare:find('[^%s%[%]{},:]') then
    for token in bare:gmatch('[^%s%[%]{},:]+') do
      if not is_scalar(token) then return false end
    end
  end
  return true
end

local function fits(value, length)
  return not value or (#value >= 1 and #value <= length)
end

-- What is wrong with a request, or nil.
local function problem_with(given, kind, max_size)
  local id, payload, trace = given.id or '', given.payload, given.traceparent
  if not id:find('^' .. PARTITION .. UUID) or id:find('%u') then
    return 'the id is not ' .. PARTITION .. '-<UUID version 7>'
  end
  if not payload then return 'there is no payload' end
  if max_size > 0 and #payload > max_size then
    return 'the payload has more than ' .. max_size .. ' bytes'
  end
  if not is_json(payload) then return 'the payload is not JSON' end
  if not fits(kind, 64) or not is_utf8(kind) then return 'type is not 1 to 64 bytes of UTF-8' end
  if kind:find('^[%l_]+$') and RESERVED:find(' ' .. kind .. ' ', 1, true) then
    return 'the type ' .. kind .. ' is reserved'
  end
  if not fits(given.idempotency_key, 128) then return 'idempotency_key is not 1 to 128 bytes' end
  if not fits(given.collapse_key, 128) then return 'collapse_key is not 1 to 128 bytes' end
  if not fits(given.channel, 1024) then return 'channel is not 1 to 1024 bytes' end
  if trace and not (#trace == 55 and trace:find('^%x%x%-%x+%-%x+%-%x%x$')) then
    return 'traceparent is not 00-<trace id>-<parent id>-<flags>'
  end
  if ledger.of_topics then
    if given.fallback_after then return 'fallback_after is not for topics' end
    if given.sender and not (fits(given.sender, 128) and is_utf8(given.sender)) then
      return 'sender is not 1 to 128 bytes of UTF-8'
    end
  end
end

---- Repetitions

-- The answer that a notification with this id got, or nil; and what is wrong.
local function answered(box, id)
  local was = call('HMGET', PREFIX .. 'n:' .. id, 'user', 'place', 'seq')
  if not was[1] then return nil end
  if was[1] ~= box.user then return nil, 'this id belongs to another user' end
  local problem = ledger.open(box)
  if problem then return nil, problem end
  if box.is_new then ledger.save(box) end
  local where = was[2] and box.epoch .. '.' .. was[2] or ''
  return { id, where, ledger.whole(was[3]) or 0, 'duplicate' }
end

-- The answer that was given to an idempotency key, or nil; and whether that was for something else.
local function remembered(key, fingerprint)
  local before, id, where = string.match(call('GET', key) or '', '^(%x+) (%S+) (%S+)$')
  if not before then return nil end
  if before ~= fingerprint then return nil, true end
  if where == '-' then return { id, '', 0, 'duplicate' } end
  local _, n = ledger.place(where:match('%.(.+)$'))
  return { id, where, ledger.seq_of(n or 0), 'duplicate' }
end

---- Not too many

local MINUTE = 60000000 -- microseconds, as all in here: a notification may cost less than 1 ms

-- Takes one out of what a user may get per minute, all of a minute's worth at once; or returns in
-- how many ms it could be taken, and leaves everything as it is.
--
-- GCRA (the "virtual scheduling" of ITU-T I.371, Annex A): `pace` in meta is when the whole minute's
-- worth will be there again. That is the same moment whatever the rate is, so a rate that is changed
-- needs no conversion, and publishers that were told different ones agree on what is left.
-- Whoever has used up a minute's worth is a minute ahead, and further only if the clock has gone
-- back. By up to a minute that is waited for, so that nobody gains by a step of a few ms. If it is
-- more, as after a failover to another machine, it is forgiven: it might be hours.
local function take_one(box, rate)
  local present = clock[1] * 1000000 + clock[2]
  local full = ledger.whole(box.pace) or present
  if full < present or full > present + 2 * MINUTE then full = present end
  full = full + math.max(1, math.floor(MINUTE / rate))
  if full > present + MINUTE then return math.ceil((full - present - MINUTE) / 1000) end
  ledger.change(box, 'pace', ('%.0f'):format(full))
end

---- Later

-- Keeps a notification until it is due.
local function schedule(box, item, at)
  local key = PREFIX .. 'n:' .. item.id
  call('HSET', key, 'state', 'accepted', 'user', box.user, 'type', item.type, 'at', now,
    'expires', item.expires, 'due', at, 'payload', item.payload)
  for _, field in ipairs { 'trace', 'collapse', 'fallback', 'channel', 'sender', 'max' } do
    if item[field] then call('HSET', key, field, item[field]) end
  end
  call('PEXPIREAT', key, item.expires + KEPT)
  call('ZADD', PREFIX .. 'due', at, 'd:' .. item.id)
end

----

local known = {
  id = 1, payload = 1, type = 1, ttl = 1, channel = 1, idempotency_key = 1, idempotency_ttl = 1,
  collapse_key = 1, deliver_at = 1, fallback_after = 1, max = 1, events = 1, max_size = 1,
  traceparent = 1, rate = 1, priority = 1,
}
if ledger.of_topics then known.sender = 1 end
local given, wrong = ledger.arguments(known)
if not given then return ledger.refuse(wrong) end
local box = ledger.named_box()
if not box then return ledger.refuse('the key is not ts:{<partition>}:meta:<owner>') end
local ttl = ledger.number(given, 'ttl', 7 * DAY, 1000, 30 * DAY)
local idempotency_ttl = ledger.number(given, 'idempotency_ttl', 300000, 1, 30 * DAY)
local due = ledger.number(given, 'deliver_at', 0, 0, now + 30 * DAY)
local fallback = ledger.number(given, 'fallback_after', nil, 1, 30 * DAY)
local limit = ledger.number(given, 'max', 1000, 1, 1e6)
local max_size = ledger.number(given, 'max_size', 10240, 0, 1e9)
ledger.events_max = ledger.number(given, 'events', 10000, 0, 1e9)
local rate = ledger.number(given, 'rate', 0, 0, 1e9)
local is_urgent = ledger.number(given, 'priority', 0, 0, 1) == 1
local kind = given.type or 'notification'
wrong = given.problem or problem_with(given, kind, max_size)
if wrong then return ledger.refuse(wrong) end

local id = given.id
local reply, problem = answered(box, id)
if problem then return ledger.refuse(problem) end
if reply then return reply end
local memory, fingerprint
if given.idempotency_key then
  memory = PREFIX .. 'idem:' .. box.owner .. ':' .. ledger.encoded(given.idempotency_key)
  fingerprint = redis.sha1hex(kind .. '\0' .. given.payload)
  reply, problem = remembered(memory, fingerprint)
  if problem then
    return redis.error_reply('IDEMPOTENCY this key was used for another notification')
  end
  if reply then return reply end
end
problem = ledger.open(box)
if problem then return ledger.refuse(problem) end
if rate > 0 and not is_urgent and not ledger.shared then
  local wait = take_one(box, rate)
  if wait then return redis.error_reply(('RATELIMITED %.0f'):format(wait)) end
end

local start = math.max(now, due)
local item = {
  id = id,
  type = kind,
  payload = given.payload,
  expires = start + ttl,
  trace = given.traceparent,
  collapse = given.collapse_key,
  fallback = fallback and start + fallback,
  channel = given.channel,
}
if ledger.of_topics then
  item.sender = given.sender
  item.max = limit -- what is due later is published by who does not know it
  -- Withdrawals are announced by who does not know the prefix.
  local usual = ledger.usual_channel(box)
  if item.channel and item.channel ~= (box.channel or usual) then
    ledger.change(box, 'channel', item.channel)
  end
end
if due > now then
  schedule(box, item, due)
  reply = { id, '', 0, 'scheduled' }
else
  ledger.post(box, item, limit)
  reply = { id, ledger.point_of(box), box.seq, 'accepted' }
end
ledger.tell('accepted', box, id, reply[3], '', '')
ledger.save(box)
if memory then
  local where = reply[2] == '' and '-' or reply[2]
  call('SET', memory, fingerprint .. ' ' .. id .. ' ' .. where, 'PX', idempotency_ttl)
end
return reply
