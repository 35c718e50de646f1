-- chat_attach: a connection takes a chat session, and so takes it away from another one.
--
-- KEYS[1]  ts:session:{<session>}, a hash: n count, o owner ('' anonymous), h holder (connection
--          id and a number, '' if nobody), t its turn, v version of its latest write, i ids of the latest
--          messages with their counts, p those who have held it before, the latest first
-- ARGV     moment by this Redis's clock after which it is void (ms; 0: never), holder, user (''
--          anonymous), '1' if it may be created, ms it lives, what comes before a life in the names
--          of channels, the holder's life
-- Reply    {moment of now, what came of it, count, ids, turn, holder before ('' if none)}, or
--          {moment of now, 'late'}; see chat_store.py
--
-- Whose turn is greater came later. Turns are moments, so that they grow even when Redis has lost
-- what it knew. Who has held the session before never gets it again: it would be a late duplicate
-- of his first command, and rob who came after him. And who has not held it gets it only while he
-- waits for it: his client may have gone since, and be back elsewhere.

local call = redis.call
local key, me, user = KEYS[1], ARGV[2], ARGV[3]
local PAST = 4

local clock = call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
if tonumber(ARGV[1]) > 0 and now > tonumber(ARGV[1]) then return { now, 'late' } end

local function life(holder) return holder:match('^(.*)%-') or '' end

local known = redis.pcall('HMGET', key, 'n', 'o', 'h', 't', 'i', 'p')
if known.err then
  if not known.err:find('WRONGTYPE', 1, true) then return known end
  call('DEL', key)
  known = {}
end
local count, owner, holder = tonumber(known[1]), known[2] or '', known[3] or ''
local turn, ids, past = tonumber(known[4]) or 0, known[5] or '', known[6] or ''

if not count and ARGV[4] ~= '1' then return { now, 'unknown', 0, '', 0, '' } end
if count and owner ~= '' and owner ~= user then return { now, 'forbidden', 0, '', 0, '' } end
if count and holder == me then
  if owner ~= user then call('HSET', key, 'o', user) end
  call('PEXPIRE', key, ARGV[5])
  return { now, count > 0 and 'resumed' or 'created', count, ids, turn, '' }
end
if (' ' .. past .. ' '):find(' ' .. me .. ' ', 1, true) then
  return { now, 'superseded', 0, '', 0, '' }
end

if holder ~= '' then
  local kept = { holder }
  for one in past:gmatch('%S+') do
    if #kept < PAST then kept[#kept + 1] = one end
  end
  past = table.concat(kept, ' ')
end
turn = math.max(turn + 1, now)
call('HSET', key, 'n', string.format('%.0f', count or 0), 'o', user, 'h', me,
  't', string.format('%.0f', turn), 'v', 0, 'p', past)
call('PEXPIRE', key, ARGV[5])
if holder ~= '' and life(holder) ~= ARGV[7] then
  call('PUBLISH', ARGV[6] .. life(holder), holder)
end
return { now, count and 'resumed' or 'created', count or 0, ids, turn, holder }
